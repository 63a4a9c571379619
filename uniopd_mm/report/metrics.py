"""The names of all metrics of a run, with unit, healthy range and meaning.

``python -m uniopd_mm.report.metrics`` prints the table that stands in this folder's README.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Unit = Literal["nats/token", "nats", "share", "tokens", "tokens/s", "s", "rows", ""]


@dataclass(frozen=True, slots=True)
class Metric:
    """One documented metric; ``NAME`` in a name stands for a domain, a teacher, a phase or a class of reasons."""

    name: str
    unit: Unit
    healthy: str
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric(
        "train/gap",
        "nats/token",
        "below 0, rising towards 0; from the first step under -2 = look at the alignment",
        "mean log p_teacher - log p_student over the scored tokens: minus the reverse KL, estimated",
    ),
    Metric("train/accuracy", "share", "rising", "correct rollouts among those with a known outcome"),
    Metric("train/unknown_share", "share", "0", "rollouts whose outcome is unknown (timeout, judge down)"),
    Metric(
        "train/inverted_share",
        "share",
        "falling, below 0.5",
        "groups with a negative margin among those that have correct and incorrect rollouts",
    ),
    Metric(
        "train/margin",
        "nats/token",
        "above 0",
        "mean return of correct minus incorrect rollouts before calibration, averaged over such groups",
    ),
    Metric(
        "train/margin_after", "nats/token", "at least calibration.delta", "train/margin after calibration"
    ),
    Metric("train/inverted_share_after", "share", "0 with shift", "train/inverted_share after calibration"),
    Metric("train/mixed_groups", "", "most of the groups", "groups with correct and incorrect rollouts"),
    Metric(
        "train/return_correct",
        "nats/token",
        "above train/return_incorrect",
        "mean return of correct rollouts",
    ),
    Metric("train/return_incorrect", "nats/token", "below 0", "mean return of incorrect rollouts"),
    Metric(
        "train/gap_masked",
        "share",
        "below 0.01",
        "trained tokens without loss because |gap| >= loss.gap_mask",
    ),
    Metric(
        "train/clipped", "share", "near 0 with one update per batch", "trained tokens whose ratio was clipped"
    ),
    Metric("train/ratio", "", "1 with one update per batch", "mean p_student(now) / p_student(when sampled)"),
    Metric(
        "train/mismatch",
        "nats",
        "below 0.01",
        "rollout/mismatch over the trained tokens, when it is corrected for",
    ),
    Metric(
        "train/mismatch_capped",
        "share",
        "near 0",
        "trained tokens whose importance weight was cut to mismatch_cap",
    ),
    Metric(
        "train/entropy",
        "nats/token",
        "slowly falling, not collapsing to 0",
        "mean -log p of the sampled tokens, an estimate of the student's entropy",
    ),
    Metric(
        "train/loss",
        "",
        "small, either sign",
        "clipped policy-gradient loss; its level says little, its jumps do",
    ),
    Metric(
        "train/grad_norm",
        "",
        "steady; spikes are clipped at optim.max_grad_norm",
        "global norm before clipping",
    ),
    Metric("train/lr", "", "as scheduled", "learning rate of the language model's parameters"),
    Metric("rollout/length", "tokens", "steady", "mean response length"),
    Metric("rollout/truncated_share", "share", "below 0.05", "rollouts that ended at rollout.max_new_tokens"),
    Metric(
        "rollout/kept_share",
        "share",
        "0.5 to 1",
        "rollouts that balancing and margin masking left in the update",
    ),
    Metric("rollout/scored_share", "share", "1", "response tokens with a usable teacher log-probability"),
    Metric(
        "scored/NAME",
        "share",
        "1 with equal vocabularies, else near 1; lower with align: exact",
        "rollout/scored_share of one teacher: how far its tokens cover the student's",
    ),
    Metric(
        "unscored/NAME",
        "share",
        "absent",
        "rollouts without any scored token: server = no answer, reply = unusable answer, alignment = nothing to score",
    ),
    Metric(
        "rollout/failed_share",
        "share",
        "absent",
        "rollouts asked of a sampling server that never came, of all asked; they take no part in the step",
    ),
    Metric(
        "rollout/staleness",
        "",
        "absent, or steady and small",
        "optimizer steps that the weights in training are ahead of those that sampled, mean over rollouts",
    ),
    Metric(
        "rollout/mismatch",
        "nats",
        "below 0.01",
        "mean |trainer - sampler| log-probability of a token; large = stale weights or other kernels",
    ),
    Metric("domain/NAME/gap", "nats/token", "below 0, rising towards 0", "train/gap of one domain"),
    Metric("domain/NAME/accuracy", "share", "rising", "train/accuracy of one domain"),
    Metric("eval/accuracy", "share", "rising", "held-out accuracy over all rows"),
    Metric("eval/NAME/accuracy", "share", "rising; none falling", "held-out accuracy of one domain"),
    Metric("eval/n", "", "constant", "held-out answers"),
    Metric(
        "eval/unknown_share", "share", "0", "held-out answers whose outcome is unknown; not in the accuracy"
    ),
    Metric("eval/unparsed_share", "share", "falling", "held-out answers in which no answer was found"),
    Metric("eval/truncated_share", "share", "below 0.05", "held-out answers that ended at max_new_tokens"),
    Metric("eval/length", "tokens", "steady", "mean length of a held-out answer"),
    Metric("time/NAME_s", "s", "steady", "seconds in one phase: sample, verify, score, update, eval, save"),
    Metric(
        "perf/tokens_per_s", "tokens/s", "steady", "response tokens per second of the whole step, all ranks"
    ),
    Metric(
        "data/skipped", "rows", "0", "data rows skipped so far because they are malformed (skipped.jsonl)"
    ),
)


def find_metric(name: str) -> Metric | None:
    """The documentation of a metric (``domain/NAME/gap`` for ``domain/chart/gap``); None = undocumented."""
    return next((m for m in METRICS if m.name == name or name_in(m.name, name)), None)


def name_in(pattern: str, name: str) -> str | None:
    """What NAME stands for, e.g. ``chart`` where ``name`` is ``eval/chart/accuracy``; None = no match."""
    match = re.fullmatch(re.escape(pattern).replace("NAME", "(.+)"), name)
    return match.group(1) if match else None


def format_metric(name: str, value: float) -> str:
    """Value in the metric's unit for people: ``54.7 %``, ``9.1 s``, ``412``; ``nan`` stays visible."""
    metric = find_metric(name)
    unit = metric.unit if metric else ""
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "s":
        return f"{value:.1f} s"
    if unit in ("tokens", "tokens/s", "rows"):
        return f"{value:.0f}"
    return f"{value:.3f}" if unit.startswith("nats") else f"{value:.3g}"


def markdown_table() -> str:
    """METRICS as a Markdown table."""
    rows = [
        f"| `{m.name}` | {m.unit or '-'} | {m.healthy} | {m.meaning.replace('|', '&#124;')} |"
        for m in METRICS
    ]
    return "\n".join(["| name | unit | healthy | meaning |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(markdown_table())
