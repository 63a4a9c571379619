"""Checks of models, vocabularies, context lengths and of the sampler.

T = student tokens, U = teacher tokens of a response; log-probabilities in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from uniopd_mm.config import RolloutConfig, TrainConfig
from uniopd_mm.errors import AlignmentError
from uniopd_mm.models import MultimodalLM, context_length, group_logprobs, start_decoding
from uniopd_mm.preflight.findings import Finding
from uniopd_mm.rollout import Group, Prompt, fill
from uniopd_mm.servers.serving import find_context
from uniopd_mm.teachers import AlignedTeacher, RemoteTeacher, TeacherPool
from uniopd_mm.teachers.pool import route

if TYPE_CHECKING:
    from PIL.Image import Image

    from uniopd_mm.processors import EncodedPrompt

LOW_COVERAGE = 0.5
"""A teacher that scores a smaller share of the student's tokens leaves most of every response without a signal."""

SAMPLER_TOLERANCE = {"float32": 0.1, "bfloat16": 0.3}
"""Mean |student - sampler| in nats per token up to which the sampler has the student's weights: kernels differ by far
less on average, other weights by far more."""


def served_groups(pool: TeacherPool, groups: list[Group]) -> Iterator[tuple[AlignedTeacher, list[Group]]]:
    """Every teacher with those of the groups that it scores."""
    for name, teacher in pool.teachers.items():
        if isinstance(teacher, AlignedTeacher):
            yield teacher, [g for g in groups if route(pool.settings, g.prompt.domain) == name]


# ---------------------------------------------------------------------- the student


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
    limit = context_length(student.text_config)
    longest = max(len(g.encoded.input_ids) for g in groups)
    text = f"longest of {len(groups)} prompts {longest} tokens + {max_new_tokens} new of {limit} positions"
    if limit is None or longest + max_new_tokens <= limit:
        return Finding("context", text, True)
    return Finding("context", f"{text}; lower rollout.max_new_tokens or student.max_pixels", False)


def score_student(
    student: MultimodalLM, groups: list[Group], config: TrainConfig, temperature: float
) -> list[Group]:
    """``student_logprobs`` by the trainer's own forward pass, whoever sampled."""
    with torch.no_grad():
        values = group_logprobs(
            student,
            groups,
            [g.encoded for g in groups],
            temperature,
            config.rollout.concurrent_rollouts,
            config.distributed.micro_tokens,
        )
    return fill(groups, "student_logprobs", values)


# ---------------------------------------------------------------------- teachers


def check_servers(pool: TeacherPool) -> list[Finding]:
    """What the probe of each teacher behind servers found; it stops a run by itself when it fails."""
    return [
        Finding(f"server {name}", teacher.server.report, True)
        for name, teacher in pool.teachers.items()
        if isinstance(teacher, RemoteTeacher)
    ]


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
        except AlignmentError as error:
            findings.append(Finding(f"view {domain}", str(error), False, "templates"))
            continue
        text = (
            f"teacher {teacher.name} (view {view_of(teacher, domain)}): student {len(group.encoded.input_ids)} prompt "
            f"tokens, {_n_image(group.encoded)} of them image; teacher {len(encoded.input_ids)}, {_n_image(encoded)} image"
        )
        findings.append(Finding(f"view {domain}", text, True, "templates"))
    return findings


def view_of(teacher: AlignedTeacher, domain: str) -> str:
    """What the teacher sees of a picture in this domain: image, text or drop."""
    return teacher.settings.view_of(domain) or ("image" if teacher.sees_images else "text")


def _n_image(encoded: EncodedPrompt) -> int:
    return sum(end - start for start, end in encoded.image_spans)


def check_vocabularies(pool: TeacherPool) -> list[Finding]:
    """Equal vocabularies are scored id by id, different ones by bytes."""
    from uniopd_mm.alignment import difference

    findings = []
    for teacher in pool.teachers.values():
        if not isinstance(teacher, AlignedTeacher):
            continue
        student, theirs = teacher.aligner.student, teacher.aligner.teacher
        sizes = f"{len(student.tokens)} and {len(theirs.tokens)} ids"
        if teacher.aligner.by_id:
            text = f"same as the student's ({sizes}): scored id by id"
        else:
            same_size = len(student.tokens) == len(theirs.tokens)
            size = (
                f"of the same size ({len(student.tokens)} ids) but different"
                if same_size
                else f"differs, {sizes}"
            )
            why = difference(student, theirs)
            text = f"{size} ({why}): aligned by bytes, align={teacher.settings.align}"
        findings.append(Finding(f"vocabulary {teacher.name}", text, True, "alignment"))
    return findings


def check_coverage(pool: TeacherPool, groups: list[Group]) -> list[Finding]:
    """The share of the student's tokens that each teacher can score, on responses that the student sampled."""
    findings = []
    for teacher, served in served_groups(pool, groups):
        aligned = [teacher.aligner.align(r.response_ids, r.finish) for g in served for r in g.rollouts]
        n_tokens = sum(int(a.ordinary.sum()) for a in aligned)
        if not n_tokens:
            continue
        mode = teacher.settings.align
        share = sum(a.coverage(mode) * int(a.ordinary.sum()) for a in aligned) / n_tokens
        text = f"{share:.1%} of {n_tokens} sampled tokens can be scored (align={mode})"
        problems = [a.problem for a in aligned if a.problem]
        if problems:
            text += f"; {len(problems)} of {len(aligned)} responses are lost from some place on, e.g. {problems[0]}"
        if share < LOW_COVERAGE:
            way_out = (
                f"type teachers.{teacher.name}.align=span" if mode == "exact" else "choose a closer teacher"
            )
            text += f". Less than {LOW_COVERAGE:.0%} of a response would be taught: {way_out}"
        ok = False if share == 0 else None if share < LOW_COVERAGE else True
        findings.append(Finding(f"coverage {teacher.name}", text, ok, "alignment"))
    return findings


def check_teacher_context(
    pool: TeacherPool,
    prompts: Iterable[tuple[Prompt, tuple[Image, ...]]],
    sampled: list[Group],
    max_new_tokens: int,
) -> list[Finding]:
    """The share of prompts behind which a response of full length passes the end of the teacher's context.

    ``prompts`` with their pictures; ``sampled`` tells how many teacher tokens a student token makes.
    """
    lengths: dict[str, list[int]] = {}
    for prompt, images in prompts:
        teacher = pool.teachers[route(pool.settings, prompt.domain)]
        if isinstance(teacher, AlignedTeacher):
            messages, use_images = teacher.messages(prompt)
            encoded = teacher.processor.encode(list(messages), images if use_images else ())
            lengths.setdefault(teacher.name, []).append(len(encoded.input_ids))
    findings = []
    for teacher, served in served_groups(pool, sampled):
        limit = context_limit(teacher)
        if limit is not None and teacher.name in lengths:
            new = math.ceil(max_new_tokens * _expansion(teacher, served))
            findings.append(_fits(teacher, lengths[teacher.name], limit, max_new_tokens, new))
    return findings


def _fits(teacher: AlignedTeacher, lengths: list[int], limit: int, max_new_tokens: int, new: int) -> Finding:
    too_long = sum(n + new > limit for n in lengths)
    alone = sum(n >= limit for n in lengths)
    theirs = "" if new == max_new_tokens else f" (about {new} of the teacher's)"
    text = (
        f"{too_long} of {len(lengths)} prompts ({too_long / len(lengths):.0%}) leave no room for {max_new_tokens} "
        f"new tokens{theirs} in its context of {limit}; longest prompt {max(lengths)}"
    )
    ok = True
    if too_long:
        server = " or start the server with a longer --max-model-len" if teacher.settings.server else ""
        text += f". Lower rollout.max_new_tokens or teachers.{teacher.name}.max_pixels{server}"
        ok = False if alone > teacher.settings.max_unscored_share * len(lengths) else None
    return Finding(f"context {teacher.name}", text, ok)


def context_limit(teacher: AlignedTeacher) -> int | None:
    """Tokens that the teacher takes: of its configuration, or fewer where its servers say so; None = not known."""
    limits = [context_length(teacher.processor.config.get_text_config())]
    if isinstance(teacher, RemoteTeacher):
        limits.append(find_context(teacher.server.pool))
    return min((n for n in limits if n is not None), default=None)


def _expansion(teacher: AlignedTeacher, groups: list[Group]) -> float:
    """Teacher tokens per student token of the sampled responses, 1 at least."""
    rollouts = [r for g in groups for r in g.rollouts]
    n_student = sum(len(r.response_ids) for r in rollouts)
    if teacher.aligner.by_id or not n_student:
        return 1.0
    n_teacher = sum(len(teacher.aligner.align(r.response_ids, r.finish).teacher_ids) for r in rollouts)
    return max(1.0, n_teacher / n_student)


# ---------------------------------------------------------------------- sampling


def check_temperature(config: TrainConfig) -> Finding:
    """Tokens are sampled from the distribution that is scored."""
    sampled, scored = config.rollout.temperature, config.loss.score_temperature
    text = f"sampled at {sampled:g}, scored at {scored:g}"
    if sampled == scored:
        return Finding("temperature", text, True, "sampling")
    remote = any(t.server for t in config.teachers.values())
    other = "" if remote or not sampled else f" or loss.score_temperature={sampled:g}"
    if sampled == 0:
        meaning = f"greedy: all {config.rollout.n} rollouts of a prompt are the same answer, and nothing else is explored"
    else:
        kind = "sharper" if sampled < scored else "flatter"
        meaning = (
            f"tokens come from a {kind} distribution than the one that is trained, so the mean advantage is no longer "
            "an estimate of the divergence from the teacher"
        )
    servers = " (servers score at 1 only)" if remote else ""
    return Finding(
        "temperature",
        f"{text}: {meaning}. Type rollout.temperature={scored:g}{other}{servers}",
        None,
        "sampling",
    )


def check_truncation(student: MultimodalLM, groups: list[Group], sampling: RolloutConfig) -> Finding:
    """Nothing is cut off the distribution that tokens are sampled from; where it is, how much (first tokens)."""
    from uniopd_mm.engines.sampling import truncate

    cuts = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    used = [
        f"{name}={getattr(sampling, name):g}" for name, off in cuts.items() if getattr(sampling, name) != off
    ]
    if not used or sampling.temperature == 0:
        return Finding(
            "truncation", "whole distribution sampled (no top_p, top_k or min_p)", True, "sampling"
        )
    with torch.no_grad():
        hidden = start_decoding(student, [g.encoded for g in groups], n=1).hidden_RH
        weights = (student.logits(hidden) / sampling.temperature).softmax(-1)
    cut = float((1 - truncate(weights, sampling).sum(-1)).clamp(min=0).mean())
    text = (
        f"{', '.join(used)} cuts {cut:.1%} off the distribution of the first token (mean of {len(groups)} prompts): "
        f"what is sampled is {-math.log(max(1 - cut, 1e-9)):.3f} nats likelier than its score says, and what is cut off "
        "is never corrected by the teacher. "
        f"Type {' '.join(f'rollout.{n}={cuts[n]:g}' for n in cuts if getattr(sampling, n) != cuts[n])}"
    )
    return Finding("truncation", text, None, "sampling")


def check_sampler(
    student: MultimodalLM, groups: list[Group], config: TrainConfig, temperature: float | None
) -> Finding:
    """Servers that sample have the student's weights: their log-probabilities are those of our own forward pass.

    ``temperature`` that ``sampler_logprobs`` are at; None = not known.
    """
    if temperature is None:
        text = "not compared: the servers do not say at which temperature their log-probabilities are"
        return Finding("sampler", text, None, "sampling")
    gaps = []
    for group in score_student(student, groups, config, temperature):
        for rollout in group.rollouts:
            assert rollout.student_logprobs is not None
            gaps.append((rollout.student_logprobs - rollout.sampler_logprobs).abs())
    n_tokens = sum(map(len, gaps))
    if not n_tokens:
        return Finding("sampler", "the servers sampled nothing", False, "sampling")
    gap_N = torch.cat(gaps)
    limit = SAMPLER_TOLERANCE[config.student.dtype]
    mean = float(gap_N.mean())
    text = (
        f"mean |student - sampler| {mean:.4f} nats over {n_tokens} tokens, largest {float(gap_N.max()):.3f} "
        f"(limit of the mean {limit})"
    )
    if mean <= limit:  # nan is not
        return Finding("sampler", text, True, "sampling")
    server = config.rollout.server
    if server is not None and server.sync == "never":
        way_out = "they keep the weights they were started with (sync: never); the importance weights are all there is"
        return Finding(
            "sampler", f"{text}: the servers do not sample from these weights: {way_out}", None, "sampling"
        )
    way_out = f"are they started with {config.student.model}, in {config.student.dtype}, and do they load what is synchronised?"
    return Finding(
        "sampler", f"{text}: the servers do not sample from these weights: {way_out}", False, "sampling"
    )
