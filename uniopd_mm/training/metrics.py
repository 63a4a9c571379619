"""One step's numbers from its groups, summed over all ranks."""

from __future__ import annotations

from uniopd_mm.distributed import World
from uniopd_mm.rollout import Group
from uniopd_mm.teachers.base import is_unscored, reason_class
from uniopd_mm.training.credit import outcome_code


def rollout_metrics(
    groups: list[Group], world: World, n_failed: int = 0, updates: int | None = None
) -> dict[str, float]:
    """Accuracy, gap and lengths, overall, per domain and per teacher (names as in ``report.METRICS``).

    ``n_failed``: rollouts of this rank that were asked for and never came; ``updates``: optimizer steps that the
    weights in training have taken.  ``unscored/NAME``, ``rollout/failed_share`` and ``rollout/staleness`` are there only
    where something was unscored, failed or stale on any rank.
    """
    sums: dict[str, float] = {}
    n_asked, unscored = 0, dict[str, float]()

    def add(key: str, value: float, count: float) -> None:
        sums[key] = sums.get(key, 0.0) + value
        sums[f"#{key}"] = sums.get(f"#{key}", 0.0) + count

    if n_failed:
        add("rollout/failed_share", n_failed, 0)
    for group in groups:
        n_behind = 0 if updates is None else updates - group.weight_version
        if n_behind:
            add("rollout/staleness", n_behind * len(group.rollouts), 0)
        for rollout in group.rollouts:
            n, code = len(rollout.response_ids), outcome_code(rollout.outcome)
            add("rollout/length", n, 1)
            add("rollout/truncated_share", rollout.finish == "length", 1)
            add("rollout/kept_share", rollout.kept, 1)
            add("train/unknown_share", code < 0, 1)
            add("train/entropy", -float(rollout.sampler_logprobs.sum()), n)
            mismatch = (rollout.student_logprobs - rollout.sampler_logprobs).abs().sum()
            add("rollout/mismatch", float(mismatch), n)
            for key in ("train/accuracy", f"domain/{group.prompt.domain}/accuracy"):
                add(key, max(code, 0), code >= 0)
            if rollout.scored is None:
                continue
            n_asked += 1
            if is_unscored(rollout):
                key = f"unscored/{reason_class(rollout.unscored_reason)}"
                unscored[key] = unscored.get(key, 0.0) + 1
            n_scored = int(rollout.scored.sum())
            for key in ("rollout/scored_share", f"scored/{rollout.teacher}"):
                add(key, n_scored, n)
            gap = (rollout.teacher_logprobs - rollout.student_logprobs)[rollout.scored] if n_scored else None
            for key in ("train/gap", f"domain/{group.prompt.domain}/gap"):
                add(key, float(gap.sum()) if gap is not None else 0.0, n_scored)
    total = world.sum({**sums, **unscored, "#asked": n_asked})
    count = {k: total["#asked"] if k.startswith("unscored/") else total.get(f"#{k}", 0.0) for k in total}
    n_rollouts = total.get("#rollout/length", 0.0)
    count["rollout/staleness"] = n_rollouts
    count["rollout/failed_share"] = n_rollouts + total.get("rollout/failed_share", 0.0)
    return {k: v / count[k] for k, v in total.items() if not k.startswith("#") and count[k]}
