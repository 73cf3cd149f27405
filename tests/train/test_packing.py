"""Rows hold every document once; the world size changes only who takes them, and no unit changes another's."""

from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.packed import Document, Image, Packed, Text
from models.tokenizer import ByteTokenizer
from models.unified_objective import Totals, UnifiedObjective
from tests.models.documents import LAYOUT, draws, filled, picture, text
from tests.privacy.clipped_sums import clipped_sum
from train.benchmarks_packing import EMOJI_BY_CAPTION_BYTES, captions, packing
from train.data import public_batch
from train.packing import (
    Portion,
    Row,
    bucket_of,
    choose_bounds,
    fit_caption,
    image_buckets,
    pack,
    padding_fraction,
    rows_of_units,
    share,
    waiting_fraction,
)

TOKENS = 64
LENGTHS = st.lists(st.integers(1, TOKENS), max_size=40)
UNITS = st.lists(st.lists(st.integers(1, 40), max_size=4), max_size=20)
BOUNDS = st.sets(st.integers(1, 60), min_size=1, max_size=5).map(sorted)


def losses_on(batch: Packed) -> Callable[[nn.Module], Tensor]:
    objective, (noise, times) = UnifiedObjective(), draws(batch)
    totals = Totals(text=20, patches=20, tokens=40)
    return lambda model: objective.weighed(objective.losses(model, batch, noise, times), totals)


def taken(shares: Sequence[Sequence[Portion]]) -> list[int]:
    return sorted(row for mine in shares for portion in mine for row in portion.rows)


# rows


@given(LENGTHS)
def test_every_document_is_in_one_row_and_no_row_is_over_budget(lengths: list[int]) -> None:
    rows = pack(lengths, TOKENS)
    assert sorted(place for row in rows for place in row.documents) == list(range(len(lengths)))
    for row in rows:
        assert row.documents and row.num_tokens == TOKENS and row.padding >= 0 and row.left_out == ()
        assert row.lengths == tuple(lengths[place] for place in row.documents)


def first_fit_decreasing(lengths: Sequence[int]) -> list[list[int]]:
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        row = next((row for row in rows if sum(row) + length <= TOKENS), None)
        if row is None:
            rows.append(row := [])
        row.append(length)
    return rows


@given(LENGTHS)
def test_rows_are_those_of_first_fit_decreasing_or_fewer(lengths: list[int]) -> None:
    found, plain = [sorted(row.lengths, reverse=True) for row in pack(lengths, TOKENS)], first_fit_decreasing(lengths)
    assert sum(lengths) / TOKENS <= len(found) <= len(plain)
    assert len(found) < len(plain) or found == plain


def test_documents_of_like_lengths_leave_no_gaps() -> None:
    lengths = [18 + caption % 7 for caption in captions(0, 600)]  # three fill a row of 64, or nearly
    assert padding_fraction(pack(lengths, TOKENS)) < 0.05
    assert len(pack(lengths, TOKENS)) < len(first_fit_decreasing(lengths))


def test_a_step_resumed_packs_as_the_unbroken_run_did() -> None:
    of_records = captions(0, 100)

    def rows(step: int) -> list[Row]:
        return pack([of_records[record] for record in public_batch(3, step, 16, 100)], 128)

    unbroken = [rows(step) for step in range(9)]
    assert rows(7) == unbroken[7] != unbroken[6]


def test_what_no_row_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"document 1 has 65 tokens, a row 64: cut its caption \(`fit_caption`\)"):
        pack([3, 65], 64)
    with pytest.raises(ValueError, match="document 0 has 0 tokens: leave empty documents out"):
        pack([0], 64)
    with pytest.raises(ValueError, match="document 2 of unit 1 has 0 tokens"):
        rows_of_units([[1], [1, 1, 0]], [64])
    for bounds in ([], [3, 2], [2, 2], [0, 4]):
        with pytest.raises(ValueError, match="one or more numbers of tokens, ascending"):
            rows_of_units([[1]], bounds)


# ranks


@given(LENGTHS | UNITS, BOUNDS, st.integers(1, 9), st.integers(1, 300), st.sampled_from([0.0, 10.0]))
def test_any_number_of_ranks_takes_the_same_rows_in_equally_many_portions(
    documents: list, bounds: list[int], world_size: int, microbatch_tokens: int, token_pairs: float
) -> None:
    by_unit = bool(documents) and isinstance(documents[0], list)
    rows = rows_of_units(documents, bounds) if by_unit else pack(documents, TOKENS)
    shares = share(rows, world_size, microbatch_tokens, token_pairs)
    assert len(shares) == world_size and taken(shares) == list(range(len(rows)))
    for microbatch in zip(*shares, strict=True):  # each rank has as many
        assert {portion.num_rows for portion in microbatch} == {max(1, *(len(portion.rows) for portion in microbatch))}
        assert len({portion.num_tokens for portion in microbatch}) == 1
        for portion in microbatch:
            assert all(rows[row].num_tokens == portion.num_tokens for row in portion.rows)
            assert portion.num_rows * portion.num_tokens <= max(microbatch_tokens, portion.num_tokens)
    assert 0 <= waiting_fraction(shares, rows, token_pairs) < 1


def test_ranks_get_equal_work_even_where_attention_is_most_of_it() -> None:
    # 24 rows of a long document each and 24 of many short ones: alike in tokens, not in cost
    rows = pack([512] * 24 + [32] * 24 * 16, 512)
    rows = [rows[place * 7 % 48] for place in range(48)]
    assert {row.cost(64.0) for row in rows} == {64 * 512 + 512**2, 64 * 512 + 16 * 32**2}
    for world_size, tokens in ((2, 512), (4, 2048), (8, 1024), (8, 4096)):
        assert waiting_fraction(share(rows, world_size, tokens, 64.0), rows, 64.0) < 1e-9
    by_turns = [[Portion((place, place + 1), 2, 512) for place in range(2 * rank, 48, 4)] for rank in range(2)]
    assert waiting_fraction(by_turns, rows, 64.0) > 0.1


def test_of_rows_taken_together_the_dearest_do_not_all_go_to_one_rank() -> None:
    rows = rows_of_units([[length] for length in range(1, 65)], [64])
    assert waiting_fraction(share(rows, 4, 64 * 16, 0.0), rows, 0.0) < 0.01


def test_portions_are_as_large_as_the_microbatch_allows_and_alike() -> None:
    rows = pack([64] * 11, 64)
    assert [portion.num_rows for portion in share(rows, 1, 300, 1.0)[0]] == [4, 4, 3]
    assert [portion.num_rows for portion in share(rows, 2, 300, 1.0)[1]] == [3, 3]
    assert [len(portion.rows) for mine in share(rows, 2, 300, 1.0) for portion in mine] == [3, 3, 3, 2]
    assert [portion.num_rows for portion in share(rows, 4, 1, 1.0)[0]] == [1, 1, 1]


def test_a_step_without_rows_is_one_empty_portion_on_each_rank() -> None:
    assert share([], 2, 512, 1.0) == [[Portion((), 1, 1)]] * 2
    assert padding_fraction([]) == waiting_fraction(share([], 2, 512, 1.0), [], 1.0) == 0
    with pytest.raises(ValueError, match="world_size is 0"):
        share([], 0, 512, 1.0)


# private units


@given(UNITS, BOUNDS)
def test_a_units_row_is_its_own_and_under_the_least_bound_that_holds_it(
    units: list[list[int]], bounds: list[int]
) -> None:
    for unit, row in zip(units, rows_of_units(units, bounds), strict=True):
        assert sorted((*row.documents, *row.left_out)) == list(range(len(unit)))
        used = sum(row.lengths)
        assert row.num_tokens == min(bound for bound in bounds if bound >= used)
        assert all(used + unit[place] > bounds[-1] for place in row.left_out if place > max(row.documents, default=-1))
        assert row.left_out == () or sum(unit) > bounds[-1]


@given(UNITS, st.lists(st.integers(1, 40), max_size=4), st.integers(0, 20), BOUNDS)
def test_adding_or_removing_a_unit_leaves_every_other_units_row_as_it_was(
    units: list[list[int]], another: list[int], place: int, bounds: list[int]
) -> None:
    place = min(place, len(units))
    without = rows_of_units(units, bounds)
    (own,) = rows_of_units([another], bounds)
    assert rows_of_units([*units[:place], another, *units[place:]], bounds) == [
        *without[:place], own, *without[place:]
    ]  # fmt: skip


@settings(max_examples=40)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 12))
def test_chosen_bounds_pad_public_lengths_least(lengths: list[int], number: int, longest: int) -> None:
    held = [[min(length, longest)] for length in lengths]

    def padding(bounds: Sequence[int]) -> int:
        return sum(row.padding for row in rows_of_units(held, bounds))

    chosen = choose_bounds(lengths, number, longest)
    assert len(chosen) <= number and chosen[-1] == longest
    tried = [(*some, longest) for size in range(number) for some in combinations(range(1, longest), size)]
    assert padding(chosen) == min(map(padding, tried))


def test_bounds_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="num_bounds is 0 and longest 5"):
        choose_bounds([1], 0, 5)


def test_the_clipped_sum_is_that_of_one_bound_however_units_are_grouped() -> None:
    model = filled().double()
    units: list[list[Document]] = [[[text("a" * n, learn=True)], [text("bc", learn=True)]] for n in (1, 9, 2, 17, 4)]
    lengths = [[LAYOUT.length(document) for document in documents] for documents in units]

    def total(bounds: Sequence[int], world_size: int, microbatch_tokens: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for mine in share(rows_of_units(lengths, bounds), world_size, microbatch_tokens, 192):
            for portion in mine:
                present_B = torch.arange(portion.num_rows) < len(portion.rows)
                there = [units[row] for row in portion.rows]
                batch = LAYOUT.pack([*there, *[[]] * (portion.num_rows - len(there))], portion.num_tokens)
                part = clipped_sum("two_pass", model, losses_on(batch), present_B, bound=0.5)
                found = {name: found.get(name, 0) + value for name, value in part.items()}
        return found

    one, many = total([32], 1, 32 * 5), total([10, 16, 32], 2, 32)
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-6, atol=1e-9)


def test_packing_changes_no_loss() -> None:
    model, objective = filled(), UnifiedObjective()
    documents: list[Document] = [[text("a" * n, learn=True)] for n in captions(0, 12)]
    rows = pack([LAYOUT.length(document) for document in documents], 64)
    packed = LAYOUT.pack([[documents[place] for place in row.documents] for row in rows], 64)
    padded = LAYOUT.pack([[document] for document in documents])
    sums = [objective.losses(model, batch, *draws(batch)).text_B.sum() for batch in (packed, padded)]
    assert len(rows) < len(documents)
    torch.testing.assert_close(*sums, rtol=1e-5, atol=0)


# captions and images


def test_a_caption_gets_the_room_that_is_left_or_is_left_out() -> None:
    image = Image(picture(2, 3))
    beside = LAYOUT.length([image, text("")])
    cut = fit_caption(ByteTokenizer(), "a red cat", beside, beside + 5, "truncate")
    assert cut is not None and (bytes(cut.tokens), cut.num_dropped) == (b"a red", 4)
    assert LAYOUT.length([image, Text(cut.tokens)]) == beside + 5
    assert fit_caption(ByteTokenizer(), "a red cat", beside, beside + 5, "leave_out") is None
    whole = fit_caption(ByteTokenizer(), "a red", beside, beside + 5, "leave_out")
    assert whole is not None and whole.num_dropped == 0
    for policy in ("truncate", "leave_out"):
        assert fit_caption(ByteTokenizer(), "", beside, beside - 1, policy) is None
    with pytest.raises(ValueError, match="not valid UTF-8"):
        fit_caption(ByteTokenizer(), b"\xff", 0, 9, "truncate")


@given(st.integers(1, 16), st.integers(1, 300))
def test_buckets_are_whole_patches_about_equally_many_and_as_tall_as_wide(patch_size: int, max_patches: int) -> None:
    buckets = image_buckets(patch_size, max_patches)
    assert buckets and set(buckets) == {(width, height) for height, width in buckets}
    for height, width in buckets:
        rows, columns = height // patch_size, width // patch_size
        assert (rows * patch_size, columns * patch_size) == (height, width)
        assert rows * columns <= max_patches < min((rows + 1) * columns, rows * (columns + 1))
        assert max(rows, columns) <= 8 * min(rows, columns)


def test_an_image_goes_to_the_bucket_of_its_form() -> None:
    buckets = image_buckets(4, 64)
    assert (32, 32) in buckets and len(buckets) == len(set(buckets))
    assert bucket_of(500, 500, buckets) == bucket_of(501, 500, buckets) == (32, 32)
    wide, tall = bucket_of(100, 390, buckets), bucket_of(390, 100, buckets)
    assert wide == (16, 64) and tall == (64, 16)
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="has no area"):
            bucket_of(*size, buckets)
    assert bucket_of(10, 8100, buckets) == buckets[0] == (12, 84)  # and cropped as any other
    with pytest.raises(ValueError, match="both must be at least 1"):
        image_buckets(0, 64)


# what it saves


def test_packing_saves_what_is_promised_on_the_captions_of_emoji() -> None:
    assert sum(EMOJI_BY_CAPTION_BYTES) == 3786
    lengths = captions(1, 3786)
    assert sorted(lengths)[len(lengths) // 2] in (13, 14, 15) and abs(sum(lengths) / len(lengths) - 15.5) < 0.5
    rows = {row["name"]: row for row in packing(timed=False)}
    assert len(rows) == 16 and all(row.get("ok") is not False for row in rows.values())
    for kind in ("latents", "pixels"):
        assert rows[f"packing.{kind}.padding"]["ok"] and rows[f"packing.{kind}.over_padded_to_bound"]["ok"]
        padding = [rows[f"packing.{kind}.private_padding_{n}_bounds"]["value"] for n in (1, 2, 4, 8)]
        assert padding == sorted(padding, reverse=True)
