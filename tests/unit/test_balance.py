"""Online balancing: counts, chance, and independence of order and ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uniopd_mm.balance import balance, kept_counts
from uniopd_mm.config import BalanceConfig


def keep(
    outcomes: list[int], groups: list[int] | None = None, seed: int = 0, step: int = 0, **config
) -> list[bool]:
    groups = groups or [0] * len(outcomes)
    return balance(
        torch.tensor(outcomes, dtype=torch.int8),
        torch.tensor(groups),
        torch.arange(len(outcomes)),
        BalanceConfig(**config),
        seed,
        step,
    ).tolist()


@pytest.mark.parametrize(
    ("n_correct", "n_incorrect", "ratio", "expected"),
    [
        (6, 2, 1.0, (2, 2)),
        (2, 6, 1.0, (2, 2)),
        (4, 4, 1.0, (4, 4)),
        (6, 2, 2.0, (4, 2)),
        (4, 3, 2.0, (4, 2)),  # 4 : 3 is below 2 : 1, so incorrect ones go
        (3, 4, 2.0, (3, 1)),  # 1.5 rounds down
        (5, 1, 0.5, (1, 1)),  # half a rollout is not possible: at least 1 stays
        (1, 5, 2.0, (1, 1)),
        (3, 10, 0.3, (3, 10)),  # 3 / 0.3 is 10, also in floating point
        (200, 100, 0.29, (29, 100)),  # 100 * 0.29 is 28.999999999999996
        (5, 0, 1.0, (5, 0)),
        (0, 5, 2.0, (0, 5)),
        (5, 3, 0.0, (0, 3)),
        (5, 0, 0.0, (0, 0)),
        (5, 3, math.inf, (5, 0)),
        (0, 3, math.inf, (0, 0)),
    ],
)
def test_kept_counts(n_correct: int, n_incorrect: int, ratio: float, expected: tuple[int, int]) -> None:
    assert kept_counts(n_correct, n_incorrect, ratio) == expected


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 20.0))
def test_the_scarce_class_stays_whole_and_the_other_never_exceeds_its_share(
    c: int, i: int, ratio: float
) -> None:
    kept_c, kept_i = kept_counts(c, i, ratio)
    assert kept_c == c or kept_i == i
    assert 1 <= kept_c <= c and 1 <= kept_i <= i
    if kept_c < c:
        assert kept_c <= max(1, i * ratio + 1e-6) and kept_c + 1 > i * ratio
    if kept_i < i:
        assert kept_i <= max(1, c / ratio + 1e-6) and kept_i + 1 > c / ratio


def test_groups_are_balanced_one_by_one() -> None:
    kept = keep([1, 1, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1], scope="group")
    assert sum(kept[:3]) == 1 and kept[3] and sum(kept[4:7]) == 1 and kept[7]


def test_batch_scope_counts_over_all_groups() -> None:
    assert all(keep([1, 1, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1], scope="batch"))  # 4 : 4 already
    kept = keep([1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1], scope="batch")
    assert sum(kept[:5]) == 1 and kept[5]


def test_a_group_without_both_classes_stays_as_it_is() -> None:
    assert all(keep([1, 1, 1], [0, 0, 0])) and all(keep([0, 0, -1])) and all(keep([-1, -1]))


def test_unknown_outcomes_are_neither_counted_nor_dropped() -> None:
    kept = keep([1, 1, -1, -1, -1, 0])
    assert kept[2:5] == [True] * 3 and sum(kept[:2]) == 1 and kept[5]
    assert keep([1, -1, 0], ratio=0) == [False, True, True]


def test_ratio_zero_trains_on_no_correct_rollout_and_inf_on_no_incorrect_one() -> None:
    assert keep([1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1], ratio=0) == [False, True, False, True, False, False]
    assert keep([1, 0, 0, 0], [0, 0, 1, 1], ratio=math.inf) == [True, False, False, False]


def test_no_ratio_is_off() -> None:
    assert all(keep([1, 1, 1, 0], ratio=None))


def test_chance_depends_on_seed_and_step_and_reaches_everybody() -> None:
    outcomes = [1] * 7 + [0]
    assert keep(outcomes, seed=3, step=5) == keep(outcomes, seed=3, step=5)
    by_step = [keep(outcomes, seed=0, step=step)[:7].index(True) for step in range(140)]
    by_seed = [keep(outcomes, seed=seed, step=0)[:7].index(True) for seed in range(140)]
    for chosen in (by_step, by_seed):
        assert all(8 <= chosen.count(i) <= 35 for i in range(7)), chosen  # 20 each on average


def test_the_choice_is_the_same_on_every_machine() -> None:
    chosen = [keep([1] * 7 + [0], seed=1, step=step)[:7].index(True) for step in range(6)]
    assert chosen == [0, 0, 4, 2, 4, 1]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["group", "batch"]), st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf]))
def test_the_order_of_the_rollouts_does_not_matter(data: st.DataObject, scope: str, ratio: float) -> None:
    rows = data.draw(
        st.lists(st.tuples(st.sampled_from([-1, 0, 1]), st.integers(0, 3)), min_size=1, max_size=24)
    )
    order = data.draw(st.permutations(range(len(rows))))
    outcome_B = torch.tensor([r[0] for r in rows], dtype=torch.int8)
    group_B, keys_B = torch.tensor([r[1] for r in rows]), torch.arange(len(rows)) * 7 + 3
    config = BalanceConfig(ratio=ratio, scope=scope)
    whole_B = balance(outcome_B, group_B, keys_B, config, 11, 4)
    shuffled_B = balance(outcome_B[order], group_B[order], keys_B[order], config, 11, 4)
    assert torch.equal(shuffled_B, whole_B[order])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-1, 0, 1]), st.integers(0, 5)), min_size=1, max_size=24))
def test_groups_on_several_ranks_are_balanced_as_on_one(rows: list[tuple[int, int]]) -> None:
    outcome_B = torch.tensor([r[0] for r in rows], dtype=torch.int8)
    group_B, keys_B = torch.tensor([r[1] for r in rows]), torch.arange(len(rows))
    whole_B = balance(outcome_B, group_B, keys_B, BalanceConfig(), 1, 2)
    for rank in range(2):
        mine = group_B % 2 == rank
        part_B = balance(outcome_B[mine], group_B[mine], keys_B[mine], BalanceConfig(), 1, 2)
        assert torch.equal(part_B, whole_B[mine])


def test_repeated_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="slot"):
        balance(torch.tensor([1, 0]), torch.tensor([0, 0]), torch.tensor([4, 4]), BalanceConfig(), 0, 0)
