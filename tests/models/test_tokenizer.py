from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tokenizer import SPECIALS, ByteTokenizer, FileTokenizer

BYTES = ByteTokenizer()


@given(st.text())
def test_every_text_comes_back_from_its_bytes(text: str) -> None:
    encoded = BYTES.encode(text)
    assert encoded.num_dropped == 0
    assert BYTES.decode(encoded.tokens) == text
    assert BYTES.encode(text.encode()) == encoded


@given(st.text(), st.integers(0, 20))
def test_a_text_too_long_keeps_whole_characters_and_what_was_dropped_is_counted(text: str, room: int) -> None:
    whole, encoded = BYTES.encode(text).tokens, BYTES.encode(text, max_tokens=room)
    assert len(encoded.tokens) + encoded.num_dropped == len(whole)
    assert text.startswith(BYTES.decode(encoded.tokens))
    assert min(len(whole), room) - 3 <= len(encoded.tokens) <= room


def test_a_text_too_long_can_be_refused() -> None:
    assert BYTES.encode("four", max_tokens=4, too_long="refuse").tokens == [*b"four"]
    with pytest.raises(ValueError, match="the text has 5 tokens, 4 are allowed"):
        BYTES.encode("fives", max_tokens=4, too_long="refuse")
    with pytest.raises(ValueError, match="max_tokens is -1"):
        BYTES.encode("a", max_tokens=-1)


@pytest.mark.parametrize(
    ("text", "place"), [(b"ab\xff", "byte 2"), ("abc\udcff", "character 3"), (b"\xe2\x82", "byte 0")]
)
def test_invalid_utf_8_is_refused_by_its_place_and_not_repeated(text: str | bytes, place: str) -> None:
    with pytest.raises(ValueError, match=f"not valid UTF-8 at {place}") as caught:
        BYTES.encode(text)
    assert "ab" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_special_tokens_stand_behind_the_bytes_and_are_no_text() -> None:
    assert [BYTES.special(name) for name in SPECIALS] == [256, 257, 258, 259, 260]
    assert BYTES.vocab_size == 261
    assert BYTES.decode([257, *b"hi", 258, 256]) == "hi"
    assert max(BYTES.encode("<|end_text|>").tokens) < 256
    with pytest.raises(ValueError, match="'mask' is unknown: this tokenizer has pad, begin_text"):
        BYTES.special("mask")
    with pytest.raises(ValueError, match="token 261 is not of the vocabulary, 0 to 260"):
        BYTES.decode([261])


def test_generated_bytes_that_are_not_utf_8_decode_all_the_same() -> None:
    assert BYTES.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


def a_file(folder: Path, names: list[str], dropout: float | None = None) -> Path:
    """Byte-level BPE trained on one sentence, padding, truncating and beginning with the first of these specials."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(dropout=dropout))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a red circle above a blue square"] * 5, trainer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=16)
    tokenizer.post_processor = processors.TemplateProcessing(f"{names[0]} $A", special_tokens=[(names[0], 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_file_gives_its_vocabulary_and_nothing_of_its_templates(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(a_file(tmp_path, list(SPECIALS.values())))
    text = "a red square — ünder <|end_text|>"
    tokens = tokenizer.encode(text).tokens
    assert tokenizer.decode(tokens) == text
    assert 3 < len(tokens) < len(text.encode())
    assert not set(tokens) & set(tokenizer.specials.values()), "text never becomes a special token"
    assert tokenizer.vocab_size > max(tokens)
    assert tokenizer.encode(text, max_tokens=4).tokens == tokens[:4]
    assert tokenizer.encode(text, max_tokens=4).num_dropped == len(tokens) - 4
    assert tokenizer.decode([tokenizer.special("begin_text"), *tokens]) == text


def test_a_text_cut_short_by_a_file_keeps_whole_characters(tmp_path: Path) -> None:
    tokenizer, text = FileTokenizer(a_file(tmp_path, list(SPECIALS.values()))), "a \ufffd ü — 日本 red"
    tokens = tokenizer.encode(text).tokens
    for room in range(len(tokens)):
        encoded = tokenizer.encode(text, max_tokens=room)
        assert encoded.tokens == tokens[: len(encoded.tokens)] and len(encoded.tokens) in range(room - 2, room + 1)
        assert encoded.num_dropped == len(tokens) - len(encoded.tokens)
        assert text.startswith(tokenizer.decode(encoded.tokens))


def test_a_file_that_draws_its_merges_by_chance_always_makes_them(tmp_path: Path) -> None:
    plain = FileTokenizer(a_file(tmp_path, list(SPECIALS.values()))).encode("a red circle above").tokens
    tokenizer = FileTokenizer(a_file(tmp_path, list(SPECIALS.values()), dropout=0.9))
    assert all(tokenizer.encode("a red circle above").tokens == plain for _ in range(9))


def words(folder: Path, vocabulary: list[str], added: list[str]) -> FileTokenizer:
    """A token for each word, and none for others; with these special tokens behind."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    file = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    file.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file.add_special_tokens(added)
    file.save(str(folder / "words.json"))
    return FileTokenizer(folder / "words.json")


def test_a_text_that_a_file_has_no_token_for_is_refused_and_not_repeated(tmp_path: Path) -> None:
    tokenizer = words(tmp_path, ["a"], list(SPECIALS.values()))
    assert tokenizer.vocab_size == 1 + len(SPECIALS) and tokenizer.encode("a a").tokens == [0, 0]
    with pytest.raises(ValueError, match="the tokenizer's file cannot encode the text") as caught:
        tokenizer.encode("secret")
    assert "secret" not in str(caught.value) and caught.value.__suppress_context__


def test_a_text_that_a_file_would_take_for_a_special_token_is_refused(tmp_path: Path) -> None:
    tokenizer = words(tmp_path, ["a", *SPECIALS.values()], [])
    with pytest.raises(ValueError, match="the text spells a special token, and this file takes it for one"):
        tokenizer.encode("a <|end_text|>")


def test_a_file_may_call_its_special_tokens_otherwise(tmp_path: Path) -> None:
    names = {**SPECIALS, "pad": "<pad>", "begin_image": "<|vision_start|>"}
    path = a_file(tmp_path, list(names.values()))
    tokenizer = FileTokenizer(path, {"pad": "<pad>", "begin_image": "<|vision_start|>"})
    assert tokenizer.special("pad") == 0
    with pytest.raises(ValueError, match=r"tokenizer.json has no special token <\|pad\|>, <\|begin_image\|>: add it"):
        FileTokenizer(path)
    with pytest.raises(ValueError, match="special token 'image' is unknown: the names are pad"):
        FileTokenizer(path, {"image": "<|image|>"})
    with pytest.raises(ValueError, match="two special tokens are one"):
        FileTokenizer(path, {**names, "pad": "<|end_text|>"})


def test_what_is_no_tokenizers_file_is_refused_by_its_path(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    for name in ("broken.json", "other.json", "missing.json"):
        with pytest.raises(ValueError, match=f"{name} is no tokenizers file"):
            FileTokenizer(tmp_path / name)
