"""Checks on real prompts before anything is trained: what a run would otherwise get wrong in silence.

``scripts/train_mm.py RECIPE --check`` prints them; every run makes the cheap ones at its start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from uniopd_mm.config import TrainConfig
from uniopd_mm.errors import UniOPDError
from uniopd_mm.models import MultimodalLM, start_decoding
from uniopd_mm.rollout import Group
from uniopd_mm.teachers import AlignedTeacher, LocalTeacher, RemoteTeacher, TeacherPool
from uniopd_mm.teachers.pool import route

if TYPE_CHECKING:
    from uniopd_mm.processors import EncodedPrompt

NULL_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest |A| in nats when both sides have the same weights; bfloat16 sums differ with the order of operations."""


@dataclass(frozen=True)
class Finding:
    """One check; ``ok`` None = it does not apply here."""

    name: str
    text: str
    ok: bool | None


class PreflightError(UniOPDError, RuntimeError):
    """A check failed; training would go wrong."""


def require_ok(findings: Sequence[Finding]) -> None:
    """Raise with every failed check."""
    failed = [f"{f.name}: {f.text}" for f in findings if f.ok is False]
    if failed:
        raise PreflightError("\n  ".join(["checks before training failed:", *failed]))


def check_head(student: MultimodalLM, groups: list[Group]) -> Finding:
    """The log-probabilities we compute from hidden states are the model's own."""
    inputs = student.collate([groups[0].encoded])
    with torch.no_grad():
        logits = student.transformer(
            **inputs, position_ids=student.position_ids(inputs), logits_to_keep=1
        ).logits
        ours = student.logits(start_decoding(student, [groups[0].encoded], n=1).hidden_RH)
    difference = float((logits[:, -1].float() - ours).abs().max())
    ok = difference <= 1e-3 * max(1.0, float(ours.abs().max()))
    text = f"logits of {student.model_type} differ by {difference:.1e} from its head applied to the hidden states"
    return Finding(
        "head", text if ok else text + "; this family post-processes its logits and is not supported", ok
    )


def check_context(student: MultimodalLM, groups: list[Group], max_new_tokens: int) -> Finding:
    """Prompt and response fit into the model's positions."""
    limit = getattr(student.text_config, "max_position_embeddings", None)
    longest = max(len(g.encoded.input_ids) for g in groups)
    text = f"longest of {len(groups)} prompts {longest} tokens + {max_new_tokens} new of {limit} positions"
    if limit is None or longest + max_new_tokens <= limit:
        return Finding("context", text, True)
    return Finding("context", f"{text}; lower rollout.max_new_tokens or student.max_pixels", False)


def check_views(pool: TeacherPool, groups: list[Group]) -> list[Finding]:
    """Every teacher can render the prompts of its domains; image tokens on both sides."""
    findings = []
    for domain in sorted({g.prompt.domain for g in groups}):
        group = next(g for g in groups if g.prompt.domain == domain)
        teacher = pool.teachers[route(pool.settings, domain)]
        if not isinstance(teacher, AlignedTeacher):
            continue
        try:
            encoded = teacher.encode(group)
        except UniOPDError as error:
            findings.append(Finding(f"view {domain}", str(error), False))
            continue
        sees = teacher.settings.view or ("image" if teacher.sees_images else "text")
        text = (
            f"teacher {teacher.name} (view {sees}): student {len(group.encoded.input_ids)} prompt tokens, "
            f"{_n_image(group.encoded)} of them image; teacher {len(encoded.input_ids)}, {_n_image(encoded)} image"
        )
        findings.append(Finding(f"view {domain}", text, True))
    return findings


def check_vocabularies(pool: TeacherPool) -> list[Finding]:
    """Equal vocabularies are scored id by id, different ones by bytes."""
    from uniopd_mm.alignment import difference

    findings = []
    for teacher in pool.teachers.values():
        if not isinstance(teacher, AlignedTeacher):
            continue
        name = f"vocabulary {teacher.name}"
        if teacher.aligner.by_id:
            findings.append(Finding(name, "same as the student's: scored id by id", True))
        else:
            why = difference(teacher.aligner.student, teacher.aligner.teacher)
            findings.append(
                Finding(name, f"differs ({why}): aligned by bytes, align={teacher.settings.align}", True)
            )
    return findings


def check_servers(pool: TeacherPool) -> list[Finding]:
    """What the probe of each teacher behind servers found; it stops a run by itself when it fails."""
    return [
        Finding(f"server {name}", teacher.server.report, True)
        for name, teacher in pool.teachers.items()
        if isinstance(teacher, RemoteTeacher)
    ]


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
        return Finding(name, "another architecture or vocabulary: see the token table of --check", None)
    differences = [prompt_difference(student, g.encoded, teacher.encode(g)) for g in groups]
    same = [g for g, difference in zip(groups, differences, strict=True) if not difference]
    if not same:
        why = differences[0] if differences else "no prompt of its domains at hand"
        return Finding(
            name, f"the teacher is asked something else ({why}): see the token table of --check", None
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
    return Finding(name, text, worst <= limit and n_tokens > 0)


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


def token_table(group: Group, student: MultimodalLM) -> list[Mapping[str, object]]:
    """One scored rollout, token by token: what the student and its teacher think of it."""
    rollout = group.rollouts[0]
    rows = []
    for t, token in enumerate(student.processor.decode_tokens(rollout.response_ids)):
        is_scored = rollout.scored is not None and bool(rollout.scored[t])
        rows.append(
            {
                "token": token,
                "id": int(rollout.response_ids[t]),
                "student_lp": float(rollout.student_logprobs[t]),
                "teacher_lp": float(rollout.teacher_logprobs[t]) if is_scored else None,
                "scored": is_scored,
            }
        )
    return rows


def _n_image(encoded: EncodedPrompt) -> int:
    return sum(end - start for start, end in encoded.image_spans)
