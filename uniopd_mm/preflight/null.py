"""The null test: with the student's weights on both sides nothing may be left of the advantage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from uniopd_mm.config import TrainConfig
from uniopd_mm.models import MultimodalLM
from uniopd_mm.preflight.findings import Finding
from uniopd_mm.rollout import Group
from uniopd_mm.teachers import AlignedTeacher, LocalTeacher

if TYPE_CHECKING:
    from uniopd_mm.processors import EncodedPrompt

NULL_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest |A| in nats when both sides have the same weights; bfloat16 sums differ with the order of operations."""


def null_test(
    student: MultimodalLM, teacher: AlignedTeacher, groups: list[Group], config: TrainConfig
) -> Finding:
    """With the student's weights on both sides every advantage must be 0 (|A| <= 1e-4 nats in fp32).

    Runs the teacher's own template, processor, view and alignment over the student's weights, on prompts that come out
    the same on both sides (a template of its own, or ``image_text``, is a difference by intent, and is said).
    Of a teacher behind servers it sees all but the servers.
    ``groups`` hold rollouts with ``student_logprobs``.
    """
    name = f"null test {teacher.name}"
    if teacher.processor.model_type != student.model_type or not teacher.aligner.by_id:
        return Finding(
            name, "another architecture or vocabulary: see the token table of --check", None, "alignment"
        )
    differences = [prompt_difference(student, g.encoded, teacher.encode(g)) for g in groups]
    same = [g for g, difference in zip(groups, differences, strict=True) if not difference]
    if not same:
        why = differences[0] if differences else "no prompt of its domains at hand"
        return Finding(
            name,
            f"the teacher is asked something else ({why}): see the token table of --check",
            None,
            "alignment",
        )
    mirror = LocalTeacher(
        teacher.name,
        teacher.settings,
        MultimodalLM(student.model, teacher.processor, shared_prefix=student.shared_prefix),
        student.processor,
        config.rollout.concurrent_rollouts,
        config.distributed.micro_tokens,
    )  # the aligner is rebuilt from the same two processors
    worst, where, n_tokens = 0.0, "", 0
    for group in mirror.score(same, config.loss.score_temperature):
        for rollout in group.rollouts:
            assert rollout.scored is not None and rollout.teacher_logprobs is not None
            assert rollout.student_logprobs is not None
            if not rollout.scored.any():
                continue
            gap = torch.where(
                rollout.scored, (rollout.teacher_logprobs - rollout.student_logprobs).abs(), 0.0
            )
            n_tokens += int(rollout.scored.sum())
            if float(gap.max()) > worst:
                worst, at = float(gap.max()), int(gap.argmax())
                token = student.processor.decode_tokens(rollout.response_ids)[at]
                where = f" at token {at} {token!r} of {group.prompt.id}"
    limit = NULL_TOLERANCE[config.student.dtype]
    text = f"same weights on both sides: worst |A| {worst:.1e} nats over {n_tokens} tokens{where} (limit {limit})"
    return Finding(name, text, worst <= limit and n_tokens > 0, "alignment")


def prompt_difference(student: MultimodalLM, ours: EncodedPrompt, theirs: EncodedPrompt) -> str:
    """Where the teacher's prompt departs from the student's; empty when ids and image tensors are the same."""
    if not torch.equal(ours.input_ids, theirs.input_ids):
        pairs = zip(ours.input_ids.tolist(), theirs.input_ids.tolist(), strict=False)
        shorter = min(len(ours.input_ids), len(theirs.input_ids))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        shown = ["".join(student.processor.decode_tokens(e.input_ids[at : at + 8])) for e in (ours, theirs)]
        return f"prompts differ from token {at} on: {shown[0]!r}, the teacher's {shown[1]!r}"
    for name, value in ours.model_inputs.items():
        other = theirs.model_inputs.get(name)
        if other is None or other.shape != value.shape or not torch.allclose(value, other):
            return f"the processors give different {name}"
    return ""
