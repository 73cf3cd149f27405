"""Text as tokens: the bytes of its UTF-8 by default, or the vocabulary of a `tokenizers` JSON file.

    tokenizer = ByteTokenizer()
    encoded = tokenizer.encode(caption, max_tokens=77)      # encoded.tokens, encoded.num_dropped
    tokenizer.special("begin_text")                         # 257

Beside text there are five special tokens, which only the program places. Guarantee: no text becomes one of them, for
text that spells a special token's name is encoded as the characters it is made of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

NUM_BYTES = 256
SPECIALS = {name: f"<|{name}|>" for name in ("pad", "begin_text", "end_text", "begin_image", "end_image")}


@dataclass(frozen=True)
class Encoded:
    """A text's tokens, and how many more it had than it was given room for."""

    tokens: list[int]
    num_dropped: int = 0


class Tokenizer(ABC):
    """Tokens 0..vocab_size - 1, the special ones among them under the names of `SPECIALS`."""

    def __init__(self, vocab_size: int, specials: Mapping[str, int]) -> None:
        self.vocab_size = vocab_size
        self.specials = dict(specials)
        self._special_tokens = frozenset(specials.values())

    def special(self, name: str) -> int:
        """The token of a special name; a ValueError lists the names there are."""
        if name not in self.specials:
            raise ValueError(f"special token {name!r} is unknown: this tokenizer has {', '.join(self.specials)}")
        return self.specials[name]

    def encode(
        self, text: str | bytes, *, max_tokens: int | None = None, too_long: Literal["truncate", "refuse"] = "truncate"
    ) -> Encoded:
        """The text's tokens, none of them special; of a text that has more than `max_tokens`, the first ones, or none.

        Raises ValueError, which tells the place but not the text, where it is not valid UTF-8 (bytes that are not, or
        the half characters that a command line makes of them), and for too long a text under `refuse`.
        """
        try:
            text = text.decode() if isinstance(text, bytes) else text
            text.encode()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            unit = "byte" if isinstance(error, UnicodeDecodeError) else "character"
            raise ValueError(f"the text is not valid UTF-8 at {unit} {error.start}: give it in UTF-8") from None
        tokens = self._encode(text)
        if max_tokens is None or len(tokens) <= max_tokens:
            return Encoded(tokens)
        if max_tokens < 0:
            raise ValueError(f"max_tokens is {max_tokens}: give 0 or more")
        if too_long == "refuse":
            raise ValueError(f"the text has {len(tokens)} tokens, {max_tokens} are allowed: shorten it or truncate")
        kept = self._cut(tokens, max_tokens)
        return Encoded(kept, len(tokens) - len(kept))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens, without the special ones; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for a token that is not of the vocabulary.
        """
        plain: list[int] = []
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is not of the vocabulary, 0 to {self.vocab_size - 1}")
            if token not in self._special_tokens:
                plain.append(token)
        return self._decode(plain)

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...
    @abstractmethod
    def _decode(self, tokens: list[int]) -> str: ...
    @abstractmethod
    def _cut(self, tokens: list[int], length: int) -> list[int]: ...


class ByteTokenizer(Tokenizer):
    """A token for each byte, 0..255, then the special ones: nothing to train, and no text that it cannot tell."""

    def __init__(self) -> None:
        super().__init__(NUM_BYTES + len(SPECIALS), {name: NUM_BYTES + i for i, name in enumerate(SPECIALS)})

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def _cut(self, tokens: list[int], length: int) -> list[int]:
        while length and tokens[length] & 0xC0 == 0x80:  # the next byte goes on with a character: leave it out whole
            length -= 1
        return tokens[:length]


class FileTokenizer(Tokenizer):
    """The vocabulary of a `tokenizers` JSON file, which must hold every special token.

    specials: what the file calls them, by our names, where it is not `<|name|>`. The file's own truncation, padding and
    templates are not applied, nor its dropout: merges drawn by chance would give a text other tokens each time. Raises
    ValueError for a file that cannot be read and for special tokens it does not have.
    """

    def __init__(self, path: Path, specials: Mapping[str, str] | None = None) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{path} needs the package tokenizers: pip install tokenizers") from None
        if unknown := set(specials or {}) - set(SPECIALS):
            raise ValueError(f"special token {min(unknown)!r} is unknown: the names are {', '.join(SPECIALS)}")
        try:
            self._file = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is no tokenizers file: {error}") from None
        self._file.no_truncation()
        self._file.no_padding()
        self._file.encode_special_tokens = True  # as text
        if isinstance(self._file.model, tokenizers.models.BPE):
            self._file.model.dropout = None
        names = {**SPECIALS, **(specials or {})}
        found = {name: self._file.token_to_id(token) for name, token in names.items()}
        if missing := [names[name] for name, token in found.items() if token is None]:
            raise ValueError(
                f"{path} has no special token {', '.join(missing)}: add it, or say what it is called there"
            )
        if len(set(found.values())) < len(found):
            raise ValueError(f"{path}: two special tokens are one in {names}: give each a token of its own")
        vocab_size = 1 + max(self._file.get_vocab(with_added_tokens=True).values())
        super().__init__(vocab_size, {name: token for name, token in found.items() if token is not None})

    def _encode(self, text: str) -> list[int]:
        try:
            tokens: list[int] = self._file.encode(text, add_special_tokens=False).ids
        except Exception:  # bare, as above; what it says may repeat the text
            raise ValueError(
                "the tokenizer's file cannot encode the text: give the file a token for the unknown"
            ) from None
        if not self._special_tokens.isdisjoint(tokens):  # a file whose plain vocabulary holds a special token's name
            raise ValueError("the text spells a special token, and this file takes it for one: leave the text out")
        return tokens

    def _decode(self, tokens: list[int]) -> str:
        return self._file.decode(tokens, skip_special_tokens=False)

    def _cut(self, tokens: list[int], length: int) -> list[int]:
        whole = self._decode(tokens)
        # tokens of bytes may end within a character, which the text itself may have as U+FFFD
        while (kept := self._decode(tokens[:length])).endswith("\ufffd") and not whole.startswith(kept):
            length -= 1
        return tokens[:length]


def open_tokenizer(name: str) -> Tokenizer:
    """By the name a config gives: "bytes", or the path of a `tokenizers` file."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name))
