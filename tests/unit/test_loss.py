"""The policy loss against obviously right code, and its sums over shards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uniopd_mm.config import LossConfig
from uniopd_mm.loss import loss_denominators, policy_loss

NAN, INF = math.nan, math.inf
CONFIGS: list[dict[str, Any]] = [
    {},
    {"aggregation": "token_mean"},
    {"renormalize": True},
    {"aggregation": "token_mean", "renormalize": True},
    {"gap_mask": None, "clip_low": 0.0, "clip_high": 0.0},
    {"gap_mask": 1.5, "mismatch_cap": 1.1},
    {"mismatch_cap": None},
]


def random_batch(seed: int, n: int = 8, width: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(n, width, generator=generator, dtype=torch.float64) * scale

    old = -normal(1.0).abs()
    scored = torch.rand(n, width, generator=generator) < 0.7
    scored[:, 0] = True
    scored[-1] = False  # a rollout the teacher could not score
    kept = torch.rand(n, generator=generator) < 0.7
    kept[0], kept[1] = True, False
    return {
        "student_lp_BT": old + normal(0.3),
        "old_lp_BT": old,
        "advantages_BT": normal(1.0),
        "teacher_lp_BT": old + normal(1.0),
        "scored_BT": scored,
        "kept_B": kept,
        "sampler_lp_BT": old + normal(0.2),
    }


def gradient(batch: dict[str, Tensor], config: LossConfig, denominators: Any = None) -> tuple[float, Tensor]:
    student = batch["student_lp_BT"].clone().requires_grad_()
    if denominators is None:
        denominators = loss_denominators(batch["scored_BT"], batch["kept_B"], config)
    loss, _ = policy_loss(**{**batch, "student_lp_BT": student}, settings=config, denominators=denominators)
    loss.backward()
    assert student.grad is not None
    return loss.item(), student.grad


def plain_loss(batch: dict[str, Tensor], config: LossConfig) -> tuple[float, Tensor]:
    """The same by loops over rollouts and tokens, from the definition, with the gradient by hand."""
    n, width = batch["scored_BT"].shape
    grad = torch.zeros(n, width, dtype=torch.float64)
    token_loss, total = [[0.0] * width for _ in range(n)], 0.0
    lengths = [int(batch["scored_BT"][b].sum()) for b in range(n)]
    counted = [b for b in range(n) if not config.renormalize or (batch["kept_B"][b] and lengths[b])]
    for b in range(n):
        for t in range(width):
            if not batch["scored_BT"][b, t] or not batch["kept_B"][b]:
                continue
            student, old = batch["student_lp_BT"][b, t].item(), batch["old_lp_BT"][b, t].item()
            a = batch["advantages_BT"][b, t].item()
            if (
                config.gap_mask is not None
                and abs(student - batch["teacher_lp_BT"][b, t].item()) >= config.gap_mask
            ):
                continue
            weight = 1.0
            if config.mismatch_cap is not None:
                weight = min(math.exp(old - batch["sampler_lp_BT"][b, t].item()), config.mismatch_cap)
            ratio = math.exp(student - old)
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            token_loss[b][t] = weight * max(-ratio * a, -clipped * a)
            if -ratio * a >= -clipped * a:
                grad[b, t] = -weight * ratio * a
            if config.aggregation == "sample_mean":
                grad[b, t] /= lengths[b] * len(counted)
            else:
                grad[b, t] /= sum(lengths[c] for c in counted)
    for b in range(n):
        if config.aggregation == "sample_mean" and lengths[b]:
            total += sum(token_loss[b]) / lengths[b] / len(counted)
        elif lengths[b]:
            total += sum(token_loss[b]) / sum(lengths[c] for c in counted)
    return total, grad


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_equal_those_of_plain_code(config: dict[str, Any], seed: int) -> None:
    batch, config = random_batch(seed), LossConfig(**config)
    value, grad = gradient(batch, config)
    expected, expected_grad = plain_loss(batch, config)
    assert value == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("config", CONFIGS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), n_shards=st.integers(1, 5))
def test_the_parts_of_all_shards_sum_up_to_the_whole(
    config: dict[str, Any], seed: int, n_shards: int
) -> None:
    batch, config = random_batch(seed), LossConfig(**config)
    denominators = loss_denominators(batch["scored_BT"], batch["kept_B"], config)
    whole, whole_grad = gradient(batch, config)
    _, whole_stats = policy_loss(**batch, settings=config, denominators=denominators)
    # rollouts go to shards of uneven size, each cut to its own width
    shards = [{k: v[torch.arange(8) % n_shards == i] for k, v in batch.items()} for i in range(n_shards)]
    widths = [
        max(1, int(s["scored_BT"].any(0).nonzero().max()) + 1) if s["scored_BT"].any() else 1 for s in shards
    ]
    shards = [
        {k: v[:, :w] if v.dim() == 2 else v for k, v in s.items()}
        for s, w in zip(shards, widths, strict=True)
    ]
    added = sum(loss_denominators(s["scored_BT"], s["kept_B"], config) for s in shards)
    assert torch.equal(torch.as_tensor(added), denominators)
    total, stats = 0.0, {k: torch.zeros(2, dtype=torch.float64) for k in whole_stats}
    for i, (shard, width) in enumerate(zip(shards, widths, strict=True)):
        value, grad = gradient(shard, config, denominators)
        total += value
        mine = torch.arange(8) % n_shards == i
        torch.testing.assert_close(grad, whole_grad[mine][:, :width], rtol=0, atol=1e-14)
        for name, pair in policy_loss(**shard, settings=config, denominators=denominators)[1].items():
            stats[name] += pair
    assert total == pytest.approx(whole, abs=1e-12)
    for name, pair in whole_stats.items():
        torch.testing.assert_close(stats[name], pair, rtol=0, atol=1e-12)


def test_at_ratio_one_the_gradient_is_minus_advantage_times_grad_log_p() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(7, (2, 3, 1))
    student = logits.log_softmax(-1).gather(-1, ids).squeeze(-1)
    advantages = torch.randn(2, 3, dtype=torch.float64)
    ones = torch.ones(2, 3, dtype=torch.bool)
    for bounds in ({}, {"clip_low": 0.0, "clip_high": 0.0}):
        config = LossConfig(aggregation="token_mean", **bounds)
        loss, stats = policy_loss(
            student, student.detach(), advantages, student.detach(), ones, torch.ones(2), config, (2, 6)
        )
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (expected,) = torch.autograd.grad((-advantages * student).sum() / 6, logits, retain_graph=True)
        torch.testing.assert_close(grad, expected)
        assert stats["clipped"].tolist() == [0, 6] and stats["ratio"].tolist() == [6, 6]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_poison_where_nothing_is_scored_leaves_loss_gradient_and_statistics_alone(
    config: dict[str, Any], poison: float
) -> None:
    batch, config = random_batch(1), LossConfig(**config)
    poisoned = {
        k: v if v.dim() < 2 or v.dtype == torch.bool else torch.where(batch["scored_BT"], v, poison)
        for k, v in batch.items()
    }
    value, grad = gradient(batch, config)
    other, other_grad = gradient(poisoned, config)
    assert other == value and torch.equal(other_grad, grad)
    denominators = loss_denominators(batch["scored_BT"], batch["kept_B"], config)
    for name, pair in policy_loss(**poisoned, settings=config, denominators=denominators)[1].items():
        assert torch.equal(pair, policy_loss(**batch, settings=config, denominators=denominators)[1][name])


def one_token_each(n: int, **changes: Any) -> dict[str, Tensor]:
    zeros = torch.zeros(n, 1, dtype=torch.float64)
    batch = dict.fromkeys(("student_lp_BT", "old_lp_BT", "teacher_lp_BT"), zeros)
    batch |= {"advantages_BT": zeros + 1, "scored_BT": zeros == 0, "kept_B": torch.ones(n, dtype=torch.bool)}
    return batch | {k: torch.as_tensor(v, dtype=batch.get(k, zeros).dtype) for k, v in changes.items()}


def test_the_ratio_is_clipped_on_the_side_that_the_advantage_pushes_to() -> None:
    ratios = torch.tensor([[1.5], [1.5], [0.5], [0.5]], dtype=torch.float64)
    batch = one_token_each(4, student_lp_BT=ratios.log(), advantages_BT=[[1.0], [-1.0], [1.0], [-1.0]])
    config = LossConfig(aggregation="token_mean")
    value, grad = gradient(batch, config)
    assert value == pytest.approx((-1.28 + 1.5 - 0.5 + 0.8) / 4)
    assert (grad[:, 0] != 0).tolist() == [False, True, True, False]
    _, stats = policy_loss(**batch, settings=config, denominators=(4, 4))
    assert stats["clipped"].tolist() == [2, 4] and stats["ratio"].tolist() == pytest.approx([4.0, 4.0])


@pytest.mark.parametrize("aggregation", ["sample_mean", "token_mean"])
def test_a_gap_masked_token_has_no_loss_but_stays_in_every_denominator(aggregation: str) -> None:
    batch = one_token_each(1, **{k: [[0.0] * 4] for k in ("student_lp_BT", "old_lp_BT")})
    batch |= {
        "scored_BT": torch.ones(1, 4, dtype=torch.bool),
        "teacher_lp_BT": torch.tensor([[-10.0, -9.99, -INF, NAN]], dtype=torch.float64),
        "advantages_BT": torch.tensor([[-10.0, -2.0, -INF, NAN]], dtype=torch.float64),
    }
    for renormalize in (False, True):
        config = LossConfig(aggregation=aggregation, renormalize=renormalize)
        assert loss_denominators(batch["scored_BT"], batch["kept_B"], config).tolist() == [1, 4]
        value, grad = gradient(batch, config)
        assert value == 2.0 / 4 and grad.tolist() == [[0.0, 0.5, 0.0, 0.0]]
        _, stats = policy_loss(**batch, settings=config, denominators=(1, 4))
        assert stats["gap_masked"].tolist() == [3, 4] and stats["ratio"].tolist() == [1, 1]


def test_without_a_gap_mask_only_infinite_gaps_are_left_out() -> None:
    batch = one_token_each(2, teacher_lp_BT=[[-50.0], [-INF]], advantages_BT=[[-50.0], [-INF]])
    value, grad = gradient(batch, LossConfig(gap_mask=None))
    assert value == 25.0 and grad.tolist() == [[25.0], [0.0]]


def test_dropped_rollouts_stay_in_the_denominator_unless_renormalized() -> None:
    batch = one_token_each(4, kept_B=[True, False, False, True], scored_BT=[[True], [True], [True], [False]])
    assert gradient(batch, LossConfig())[0] == -1 / 4
    assert gradient(batch, LossConfig(renormalize=True))[0] == -1.0  # one kept rollout has a valid token
    assert gradient(batch, LossConfig(aggregation="token_mean"))[0] == -1 / 3
    assert gradient(batch, LossConfig(aggregation="token_mean", renormalize=True))[0] == -1.0


@pytest.mark.parametrize("config", CONFIGS)
def test_an_update_with_nothing_kept_has_zero_loss_and_gradient(config: dict[str, Any]) -> None:
    batch = random_batch(0) | {"kept_B": torch.zeros(8, dtype=torch.bool)}
    value, grad = gradient(batch, LossConfig(**config))
    assert value == 0.0 and (grad == 0).all()


def test_sample_mean_weighs_rollouts_and_token_mean_weighs_tokens() -> None:
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    batch = dict.fromkeys(("student_lp_BT", "old_lp_BT", "teacher_lp_BT"), zeros)
    batch |= {"advantages_BT": torch.tensor([[-1.0], [-5.0]]).double().expand(2, 4), "kept_B": torch.ones(2)}
    batch["scored_BT"] = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert gradient(batch, LossConfig())[0] == (1 + 5) / 2
    assert gradient(batch, LossConfig(aggregation="token_mean"))[0] == (1 + 4 * 5) / 5


def test_the_mismatch_weight_is_truncated_detached_and_reported() -> None:
    sampler = -torch.tensor([[0.5], [3.0]], dtype=torch.float64).log()  # old / sampler = 0.5 and 3
    batch = one_token_each(2, sampler_lp_BT=sampler)
    value, grad = gradient(batch, LossConfig(mismatch_cap=2.0))
    assert value == pytest.approx(-(0.5 + 2.0) / 2) and grad[:, 0].tolist() == pytest.approx([-0.25, -1.0])
    _, stats = policy_loss(**batch, settings=LossConfig(mismatch_cap=2.0), denominators=(2, 2))
    assert stats["mismatch_capped"].tolist() == [1, 2]
    assert stats["mismatch"].tolist() == pytest.approx([math.log(2) + math.log(3), 2])
    off = LossConfig(mismatch_cap=None)
    assert gradient(batch, off)[0] == -1.0
    assert "mismatch" in policy_loss(**batch, settings=off, denominators=(2, 2))[1]  # still reported
    assert "mismatch" not in policy_loss(**one_token_each(2), settings=off, denominators=(2, 2))[1]


def test_only_the_student_gets_a_gradient() -> None:
    batch = random_batch(0)
    for name in ("student_lp_BT", "old_lp_BT", "advantages_BT", "teacher_lp_BT", "sampler_lp_BT"):
        batch[name].requires_grad_()
    loss, stats = policy_loss(**batch, settings=LossConfig(), denominators=(8, 30))
    loss.backward()
    assert {name for name, part in batch.items() if part.grad is not None} == {"student_lp_BT"}
    assert not any(pair.requires_grad for pair in stats.values())


def test_statistics_count_trained_tokens_only() -> None:
    batch = one_token_each(3, kept_B=[True, False, True], scored_BT=[[True], [True], [False]])
    _, stats = policy_loss(**batch, settings=LossConfig(), denominators=(3, 2))
    assert {name: pair.tolist() for name, pair in stats.items()} == {
        "gap_masked": [0, 1],
        "clipped": [0, 1],
        "ratio": [1, 1],
    }
