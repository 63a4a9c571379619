"""Token advantage, returns and calibrators: hand-worked examples and invariants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uniopd_mm.advantages import calibrate, masked_mean, position_weights, rollout_return, token_advantage
from uniopd_mm.config import CalibrationConfig

NAN, INF = math.nan, math.inf
KINDS: list[dict[str, Any]] = [
    {"kind": "none"},
    *({"kind": "shift", "direction": d, "delta": 0.4} for d in ("lift", "lower", "spread")),
    {"kind": "shift", "scope": "global", "direction": "spread", "delta": 0.3},
    {"kind": "shift", "margin": "minmax", "delta": 0.1},
    {"kind": "mask", "delta": 0.5},
    {"kind": "mask", "delta": 0.5, "margin": "minmax", "scope": "global"},
    {"kind": "mask", "mask": "group", "delta": 0.05},
    {"kind": "outcome"},
    {"kind": "gc", "residual_weight": 0.7},
    {"kind": "iw"},
]


def run(
    rows: list[list[float]],
    outcomes: list[int],
    groups: list[int],
    score: list[float] | None = None,
    **config: Any,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Calibrate rows of equal length (nan = not scored) in float64."""
    rows_BT = torch.tensor(rows, dtype=torch.float64)
    score_B = None if score is None else torch.tensor(score)
    return calibrate(
        rows_BT,
        ~rows_BT.isnan(),
        torch.tensor(outcomes, dtype=torch.int8),
        torch.tensor(groups),
        CalibrationConfig(**config),
        score_B,
    )


def random_batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three groups of five, two with both classes; ragged, with holes and a rollout without a token."""
    generator = torch.Generator().manual_seed(seed)
    advantages_BT = torch.randn(15, 6, generator=generator, dtype=dtype)
    scored_BT = torch.rand(15, 6, generator=generator) < 0.7
    scored_BT[:, 0] = True
    scored_BT[4] = False
    outcome_B = torch.tensor([1, 0, 0, -1, 1, 1, 1, 0, 0, 1, 1, 1, 1, -1, 1], dtype=torch.int8)
    return advantages_BT, scored_BT, outcome_B, torch.tensor([7] * 5 + [2] * 5 + [9] * 5)


# --- token advantage, mean, return ---


def test_token_advantage_is_positive_where_the_teacher_approves_and_zero_where_not_scored() -> None:
    teacher, student = torch.tensor([[-1.0, -3.0, -INF, NAN]]), torch.tensor([[-2.0, -1.0, -1.0, -INF]])
    advantages = token_advantage(
        teacher, student.requires_grad_(), torch.tensor([[True, True, False, False]])
    )
    assert advantages.tolist() == [[1.0, -2.0, 0.0, 0.0]]
    assert not advantages.requires_grad


def test_the_sampled_gap_is_an_unbiased_estimate_of_the_negative_reverse_kl() -> None:
    student, teacher = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    gap = token_advantage(teacher.log()[None], student.log()[None], torch.ones(1, 3))[0]
    kl = (student * (student / teacher).log()).sum()
    assert (student * gap).sum().item() == pytest.approx(-kl.item())


def test_masked_mean_of_nothing_is_zero_and_its_denominator_is_the_callers() -> None:
    values, mask = torch.tensor([[1.0, 2.0, NAN], [NAN, INF, -INF]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert masked_mean(values, mask, dim=1).tolist() == [1.5, 0.0]
    assert masked_mean(values, mask).item() == 1.5
    assert masked_mean(values, mask, denominator=6).item() == 0.5
    assert masked_mean(values, mask, dim=1, denominator=torch.tensor([4, 0])).tolist() == [0.75, 0.0]


def test_masked_mean_gives_masked_values_no_gradient() -> None:
    values = torch.tensor([1.0, NAN, -INF], requires_grad=True)
    masked_mean(values, torch.tensor([True, False, False])).backward()
    assert values.grad is not None and values.grad.tolist() == [1.0, 0.0, 0.0]


def test_a_rollout_without_a_valid_token_or_with_an_infinite_one_has_no_return() -> None:
    advantages = torch.tensor([[1.0, 2.0, NAN], [NAN, NAN, NAN], [-INF, 0.0, 0.0]])
    returns, valid = rollout_return(advantages, torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]))
    assert returns.tolist() == [1.5, 0.0, 0.0] and valid.tolist() == [True, False, False]
    assert returns.dtype == torch.float64
    assert rollout_return(torch.zeros(2, 0), torch.zeros(2, 0))[1].tolist() == [False, False]


def test_padding_does_not_change_the_last_bit_of_a_return() -> None:
    advantages_BT = torch.randn(20, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scored_BT = torch.ones(20, 1000, dtype=torch.bool)
    returns, _ = rollout_return(advantages_BT, scored_BT)
    for before, after in ((0, 24), (3, 0), (13, 501)):
        wide = [torch.nn.functional.pad(part, (before, after)) for part in (advantages_BT, scored_BT)]
        assert torch.equal(rollout_return(*wide)[0], returns)


# --- margin shift ---


@pytest.mark.parametrize(
    ("direction", "expected"),
    [("lift", [1.5, 0.5, 0.0]), ("lower", [1.0, 0.0, -0.5]), ("spread", [1.25, 0.25, -0.25])],
)
def test_shift_by_hand(direction: str, expected: list[float]) -> None:
    # returns 1, 0 (correct) and 0 (incorrect): margin 0.5; wanted 1, so lambda 0.5
    after, kept, stats = run(
        [[2.0, 0.0], [0.0, 0.0], [1.0, -1.0]],
        [1, 1, 0],
        [0, 0, 0],
        kind="shift",
        direction=direction,
        delta=1.0,
    )
    assert after.mean(1).tolist() == expected and kept.all()
    assert (after[:, 0] - after[:, 1]).tolist() == [2.0, 0.0, 2.0]  # the same constant on every token
    assert stats["lambda_mean"] == 0.5 and stats["margin_before"] == 0.5 and stats["margin_after"] == 1.0


def test_a_margin_that_is_large_enough_is_not_shifted() -> None:
    rows = [[1.0, 1.0], [0.0, 0.0]]
    after, _, stats = run(rows, [1, 0], [0, 0], kind="shift", delta=0.5)
    assert after.tolist() == rows and stats["lambda_mean"] == 0.0 and stats["shifted_share"] == 0.0


def test_minmax_margin_is_worst_correct_minus_best_incorrect() -> None:
    after, _, stats = run([[3.0], [1.0], [2.0], [0.0]], [1, 1, 0, 0], [0] * 4, kind="shift", margin="minmax")
    assert stats["margin_before"] == -1.0 and after[:, 0].tolist() == [4.0, 2.0, 2.0, 0.0]


def test_global_scope_shifts_groups_that_lack_a_class() -> None:
    rows, outcomes, groups = [[0.0], [1.0]], [1, 0], [0, 1]
    assert run(rows, outcomes, groups, kind="shift", scope="global")[0].tolist() == [[1.0], [1.0]]
    assert run(rows, outcomes, groups, kind="shift", scope="group")[0].tolist() == rows


def test_unknown_outcomes_and_unscored_rollouts_take_no_part() -> None:
    # with the unknown (-9) or the unscored rollout in a class the margin would not be 1 - 0
    after, _, stats = run([[1.0], [0.0], [-9.0], [NAN]], [1, 0, -1, 1], [0] * 4, kind="shift", delta=2.0)
    assert after[:, 0].tolist() == [2.0, 0.0, -9.0, 0.0]
    assert (
        stats["margin_before"] == 1.0 and stats["return_correct"] == 1.0 and stats["return_incorrect"] == 0.0
    )


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from(["lift", "lower", "spread"]), st.sampled_from(["mean", "minmax"])
)
def test_after_a_shift_every_mixed_group_has_the_wanted_margin(
    seed: int, direction: str, margin: str
) -> None:
    batch = random_batch(seed)
    config = CalibrationConfig(kind="shift", direction=direction, margin=margin, delta=5.0)
    _, _, stats = calibrate(*batch, config)
    assert stats["n_mixed_groups"] == 2 and stats["margin_after"] == pytest.approx(5.0, abs=1e-12)
    again_BT, _, _ = calibrate(calibrate(*batch, config)[0], *batch[1:], config)
    torch.testing.assert_close(
        again_BT, calibrate(*batch, config)[0], rtol=0, atol=1e-12
    )  # nothing left to do


def test_a_margin_shifted_to_zero_does_not_count_as_inverted_in_float32() -> None:
    inverted = 0.0
    for seed in range(20):
        _, _, stats = calibrate(
            *random_batch(seed, torch.float32), CalibrationConfig(kind="shift", delta=0.0)
        )
        inverted += stats["inverted_share_before"]
        assert stats["inverted_share_after"] == 0.0 and stats["margin_after"] >= -1e-6
    assert inverted > 0


# --- margin mask ---


def test_greedy_mask_by_hand() -> None:
    # correct 4, 1, -2 (mean 1), incorrect 2, 0 (mean 1): margin 0.  Without -2 it is 2.5 - 1 = 1.5, without 2
    # it is 1 - 0 = 1: -2 goes.  1.5 < 2: without 1 it is 4 - 1 = 3, without 2 it is 2.5 - 0 = 2.5: 1 goes.
    after, kept, stats = run(
        [[4.0], [1.0], [-2.0], [2.0], [0.0]], [1, 1, 1, 0, 0], [0] * 5, kind="mask", delta=2.0, min_retain=0.0
    )
    assert kept.tolist() == [True, False, False, True, True]
    assert after[:, 0].tolist() == [4.0, 0.0, 0.0, 2.0, 0.0]
    assert stats["masked_share"] == 0.4 and stats["margin_before"] == 0.0 and stats["margin_after"] == 3.0


def test_greedy_mask_never_drops_a_class_below_its_floor() -> None:
    rows = [[float(-i)] for i in range(8)] + [[float(i)] for i in range(3)]
    _, kept, _ = run(rows, [1] * 8 + [0] * 3, [0] * 11, kind="mask", delta=100.0, min_retain=0.4)
    assert kept[:8].sum() == 3 and kept[8:].sum() == 1  # int(3.2) and max(1, int(1.2))
    assert kept[:3].all() and kept[8]  # the best correct and the worst incorrect stay


def test_greedy_mask_stops_where_dropping_does_not_help() -> None:
    # equal returns: no mean moves, although (0.1 + 0.1 + 0.1) / 3 > 0.1 in floating point
    for outcomes in ([0, 0, 0, 1, 1], [1, 1, 1, 0, 0]):
        assert run([[0.1]] * 3 + [[0.05]] * 2, outcomes, [0] * 5, kind="mask", delta=1.0)[1].all()


def test_a_margin_that_misses_delta_only_by_rounding_holds() -> None:
    rows, outcomes = [[0.7], [0.9], [0.3]], [1, 1, 0]  # 0.7 - 0.3 = 0.39999999999999997
    assert run(rows, outcomes, [0] * 3, kind="mask", margin="minmax", delta=0.4)[1].all()
    assert run(rows, outcomes, [0] * 3, kind="mask", mask="group", margin="minmax", delta=0.4)[1].all()


def test_greedy_mask_drops_the_correct_one_of_two_equal_candidates_and_the_first_of_equal_returns() -> None:
    _, kept, _ = run(
        [[2.0], [0.0], [2.0], [0.0]], [1, 1, 0, 0], [0] * 4, kind="mask", delta=0.5, min_retain=0.0
    )
    assert kept.tolist() == [True, False, True, True]
    rows, outcomes = [[5.0], [0.0], [0.0], [5.0], [3.0]], [1, 1, 1, 1, 0]
    _, kept, _ = run(rows, outcomes, [1, 1, 0, 0, 0], kind="mask", scope="global", delta=0.2, min_retain=0.0)
    assert kept.tolist() == [True, True, False, True, True]  # the equal one of the lower group index


def test_group_mask_drops_whole_groups_whose_margin_does_not_hold() -> None:
    rows = [[1.0], [0.0], [9.0], [0.0], [1.0], [9.0], [-5.0], [-5.0]]
    _, kept, stats = run(
        rows, [1, 0, -1, 1, 0, -1, 1, 1], [0, 0, 0, 1, 1, 1, 2, 2], kind="mask", mask="group", delta=0.5
    )
    assert kept.tolist() == [True, True, True, False, False, False, True, True]
    assert stats["inverted_share_before"] == 0.5 and stats["inverted_share_after"] == 0.0


def test_group_mask_over_the_whole_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="scope: group"):
        CalibrationConfig(kind="mask", mask="group", scope="global")


@pytest.mark.parametrize("config", [k for k in KINDS if k["kind"] in ("shift", "mask")])
@pytest.mark.parametrize("outcomes", [[1, 1, 1], [0, 0, 0], [-1, -1, -1], [1, -1, 1]])
def test_a_batch_without_both_classes_is_untouched(config: dict[str, Any], outcomes: list[int]) -> None:
    rows = [[0.5, -1.0], [2.0, 1.0], [-3.0, 0.0]]
    after, kept, stats = run(rows, outcomes, [0, 0, 0], **config)
    assert (
        after.tolist() == rows and kept.all() and stats["n_mixed_groups"] == 0 and stats["masked_share"] == 0
    )


# --- the other calibrators ---


def test_outcome_adds_a_constant_to_known_outcomes_only() -> None:
    after, _, stats = run(
        [[1.0, NAN], [1.0, 0.0], [1.0, 0.0]], [1, 0, -1], [0, 0, 1], kind="outcome", outcome_weight=0.3
    )
    torch.testing.assert_close(
        after, torch.tensor([[1.3, 0.0], [0.7, -0.3], [1.0, 0.0]], dtype=torch.float64)
    )
    assert stats["shifted_share"] == pytest.approx(2 / 3)


def test_gc_by_hand() -> None:
    # returns 2 and 0 (z 1, -1), rewards 0 and 1 (z -1, 1): residuals -2 and 2; in the first rollout u = -1, 1
    after, _, _ = run([[1.0, 3.0], [0.0, 0.0]], [0, 1], [0, 0], kind="gc", residual_weight=0.1)
    credit = 1 + math.tanh(0.5)
    expected = [[1 - 0.2 * (2 - credit), 3 - 0.2 * credit], [0.2, 0.2]]  # a flat rollout has credit 1
    torch.testing.assert_close(after, torch.tensor(expected, dtype=torch.float64))


def test_gc_takes_graded_rewards_and_leaves_unknown_ones_out() -> None:
    # rewards 0, 0.5, 1 against returns 0, 1, 2: the scores agree; the unknown rollout has none
    rows = [[0.0], [1.0], [2.0], [50.0]]
    after, _, _ = run(
        rows, [0, 0, 1, -1], [0] * 4, score=[0.0, 0.5, 1.0, NAN], kind="gc", advantage_clip=100.0
    )
    torch.testing.assert_close(after, torch.tensor(rows, dtype=torch.float64))
    # rewards 0, 0, 1 do not agree
    after, _, _ = run(rows, [0, 0, 1, -1], [0] * 4, kind="gc", residual_weight=1.0, advantage_clip=100.0)
    z = torch.tensor([-1.0, -1.0, 2.0]).double() / 2**0.5 - torch.tensor([-1.0, 0.0, 1.0]).double() * 1.5**0.5
    torch.testing.assert_close(after[:3, 0], torch.tensor([0.0, 1.0, 2.0]).double() + z)
    assert after[3].item() == 50.0


def test_gc_has_no_residual_where_reward_or_return_is_flat_and_clips() -> None:
    rows = [[1.0, 2.0], [3.0, 12.0]]
    assert run(rows, [1, 1], [0, 0], kind="gc")[0].tolist() == [[1.0, 2.0], [3.0, 10.0]]
    assert run([[1.0, 2.0], [2.0, 1.0]], [1, 0], [0, 0], kind="gc")[0].tolist() == [[1.0, 2.0], [2.0, 1.0]]
    assert run(rows, [1, 0], [0, 1], kind="gc", advantage_clip=99.0)[0].tolist() == rows  # groups of one


def test_iw_by_hand() -> None:
    # |A| = 1, 3, (not scored), 4 of 8: the shares spent before are 0, 1/8, 4/8
    after, _, _ = run([[1.0, -3.0, NAN, 4.0]], [1], [0], kind="iw", position_weight=0.5)
    torch.testing.assert_close(
        after, torch.tensor([[1.5, -3 * (1 + 0.5 * 7 / 8), 0.0, 4 * 1.25]], dtype=torch.float64)
    )


def test_iw_weights_fall_from_one_plus_gamma_and_are_one_without_a_return() -> None:
    advantages = torch.tensor([[0.0, 0.0], [-INF, 1.0], [2.0, 2.0]])
    weights = position_weights(advantages, torch.ones(3, 2), gamma=0.5)
    assert weights.tolist() == [[1.5, 1.5], [1.0, 1.0], [1.5, 1.25]]


# --- what holds for every calibrator ---


@pytest.mark.parametrize("config", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_permuting_rollouts_permutes_the_result(
    config: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    batch = random_batch(seed)
    order = data.draw(st.permutations(range(15)))
    after_BT, kept_B, stats = calibrate(*batch, CalibrationConfig(**config))
    other_BT, other_kept_B, other_stats = calibrate(
        *(part[order] for part in batch), CalibrationConfig(**config)
    )
    assert torch.equal(other_BT, after_BT[order]) and torch.equal(other_kept_B, kept_B[order])
    assert other_stats == stats


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
def test_what_stands_in_unscored_positions_and_padding_does_not_matter(
    config: dict[str, Any], poison: float
) -> None:
    advantages_BT, scored_BT, outcome_B, group_B = random_batch(3)
    after_BT, kept_B, stats = calibrate(
        advantages_BT, scored_BT, outcome_B, group_B, CalibrationConfig(**config)
    )
    assert after_BT.isfinite().all() and (after_BT[~scored_BT] == 0).all()
    wide_BT = torch.full((15, 29), poison, dtype=torch.float64)
    wide_BT[:, 3:9] = torch.where(scored_BT, advantages_BT, poison)
    wide_scored_BT = torch.zeros(15, 29, dtype=torch.bool)
    wide_scored_BT[:, 3:9] = scored_BT
    other_BT, other_kept_B, other_stats = calibrate(
        wide_BT, wide_scored_BT, outcome_B, group_B, CalibrationConfig(**config)
    )
    torch.testing.assert_close(other_BT[:, 3:9], after_BT, rtol=0, atol=1e-14)
    assert (other_BT[~wide_scored_BT] == 0).all()
    assert torch.equal(other_kept_B, kept_B) and other_stats == pytest.approx(stats, abs=1e-12)


@pytest.mark.parametrize("config", KINDS)
def test_a_rollout_the_teacher_could_not_score_changes_nothing_for_the_others(config: dict[str, Any]) -> None:
    advantages_BT, scored_BT, outcome_B, group_B = random_batch(5)
    with_BT, with_B, _ = calibrate(advantages_BT, scored_BT, outcome_B, group_B, CalibrationConfig(**config))
    others = scored_BT.any(1)
    without_BT, without_B, _ = calibrate(
        advantages_BT[others],
        scored_BT[others],
        outcome_B[others],
        group_B[others],
        CalibrationConfig(**config),
    )
    assert torch.equal(with_BT[others], without_BT) and torch.equal(with_B[others], without_B)


@pytest.mark.parametrize("config", KINDS)
def test_statistics_are_finite_and_complete_also_for_an_empty_batch(config: dict[str, Any]) -> None:
    empty = (
        torch.zeros(0, 4),
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int8),
        torch.zeros(0, dtype=torch.int64),
    )
    after_BT, kept_B, nothing = calibrate(*empty, CalibrationConfig(**config))
    assert after_BT.shape == (0, 4) and kept_B.shape == (0,) and set(nothing.values()) == {0.0}
    stats = calibrate(*random_batch(1), CalibrationConfig(**config))[2]
    assert stats.keys() == nothing.keys() and all(math.isfinite(v) for v in stats.values())


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_input_is_left_alone_and_the_dtype_stays(config: dict[str, Any], dtype: torch.dtype) -> None:
    batch = random_batch(2, dtype)
    copy = [part.clone() for part in batch]
    after_BT, _, _ = calibrate(*batch, CalibrationConfig(**config))
    assert after_BT.dtype == dtype and all(torch.equal(a, b) for a, b in zip(batch, copy, strict=True))
