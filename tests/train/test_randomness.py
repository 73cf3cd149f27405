"""A record's chance in a step depends on the record and the step, not on the company it is in."""

import torch
from scipy import stats

from train.randomness import record_draws

SHAPE = (1, 4, 4)


def test_a_record_meets_the_same_draws_in_any_batch() -> None:
    whole = record_draws(0, "pretrain", 7, [3, 11, 5], SHAPE, 2)
    alone = record_draws(0, "pretrain", 7, [11], SHAPE, 2)
    assert torch.equal(whole.noise[2:4], alone.noise)
    assert torch.equal(whole.timestep[2:4], alone.timestep)
    assert torch.equal(whole.dropout[2:4], alone.dropout)


def test_draws_differ_between_seeds_stages_steps_records_and_draws() -> None:
    base = (0, "pretrain", 7, [3])
    others = [(1, "pretrain", 7, [3]), (0, "finetune_dp", 7, [3]), (0, "pretrain", 8, [3]), (0, "pretrain", 7, [4])]
    noise = [record_draws(*key, SHAPE, 2).noise for key in (base, *others)]
    drawn = [row for pair in noise for row in pair]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_draws_are_uniform_and_normal() -> None:
    draws = record_draws(0, "pretrain", 0, range(4000), (4,), 1)
    assert stats.kstest(draws.timestep.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(draws.dropout.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(draws.noise.flatten().double().numpy(), "norm").pvalue > 1e-3


def test_no_records_give_no_draws() -> None:
    assert record_draws(0, "pretrain", 0, [], SHAPE, 3).noise.shape == (0, *SHAPE)
