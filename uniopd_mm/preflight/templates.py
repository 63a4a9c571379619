"""How the two sides write the same conversation: end of turn, think blocks, system prompts.

Templates are compared by what they render; nothing looks at the names of models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from uniopd_mm.preflight.checks import served_groups
from uniopd_mm.preflight.findings import Finding, shorten
from uniopd_mm.processors import ProcessorError
from uniopd_mm.processors.thoughts import prompt_tail, thinking
from uniopd_mm.rollout import Group
from uniopd_mm.teachers import AlignedTeacher, TeacherPool

if TYPE_CHECKING:
    from uniopd_mm.processors import VLMProcessor

_SWITCH = "enable_thinking"
_PROBES = ("Kfoiqrnwz", "Wuxbejtmo", "Hydcpalvg")


def compare_templates(
    student: VLMProcessor, pool: TeacherPool, groups: list[Group], stops: Sequence[int] = ()
) -> list[Finding]:
    """All comparisons for every teacher that has one of the groups; ``stops``: stop tokens beside the student's own."""
    findings = [check_student_stops(student, stops)]
    for teacher, served in served_groups(pool, groups):
        findings.append(check_end_of_turn(student, teacher, stops))
        if served:
            findings.append(check_thinking(student, teacher, served[0]))
            findings.append(check_system_prompt(student, teacher, served))
    return findings


# ---------------------------------------------------------------------- end of turn


def check_student_stops(student: VLMProcessor, stops: Sequence[int] = ()) -> Finding:
    """The student stops at a token that its own chat template writes behind an answer."""
    own = student.stop_token_ids()
    name = "student's stop"
    if not own and not stops:
        text = (
            "no stop token in generation_config.json, tokenizer or template: every rollout runs to "
            "rollout.max_new_tokens. Type rollout.stop_token_ids=[ID]"
        )
        return Finding(name, text, False, "templates")
    written = student.tokenizer.encode(student.template.text_after_answer(), add_special_tokens=False)
    text = f"generation stops at {_names(student, [*own, *stops])}"
    if {*own, *stops} & set(written):
        return Finding(name, f"{text}, as the chat template writes it", True, "templates")
    behind = shorten(repr(student.template.text_after_answer()))
    text += (
        f", which its chat template never writes (behind an answer: {behind}): a model that learnt this template may not "
        "stop there. Give the model folder the right eos_token_id in generation_config.json, or add the token that ends "
        "a turn: rollout.stop_token_ids=[ID]"
    )
    return Finding(name, text, None, "templates")


def check_end_of_turn(student: VLMProcessor, teacher: AlignedTeacher, stops: Sequence[int] = ()) -> Finding:
    """The student's end of turn is scored as the teacher's; a token that the teacher never ends with is said.

    A base student with an instruct teacher has another end of turn: unscored, or scored as a token that the teacher
    finds impossible, nothing tells the student to stop, and its answers become longer and longer.
    """
    name = f"end of turn {teacher.name}"
    own, theirs = student.stop_token_ids(), teacher.processor.stop_token_ids()
    if not own:
        return Finding(name, "the student has none", None, "templates")
    goes_to = {stop: teacher.aligner.align([stop], "stop").teacher_ids.tolist() for stop in [*own, *stops]}
    shown = "; ".join(
        f"{_names(student, [stop])} -> {_names(teacher.processor, ids) if ids else 'unscored'}"
        for stop, ids in goes_to.items()
    )
    first = goes_to[own[0]]
    if not first:
        text = (
            f"{shown}: the teacher has no end of turn, so nothing teaches the student when to stop and its answers may grow "
            f"without end. Use a teacher whose generation_config.json names its eos_token_id, or a lower "
            "rollout.max_new_tokens"
        )
        return Finding(name, text, None, "templates")
    if first[0] not in theirs:
        text = (
            f"{shown}: the teacher itself ends with {_names(teacher.processor, theirs) or 'nothing'}, and what the student "
            "ends with is unlikely to it: answers may grow without end"
        )
        return Finding(name, text, None, "templates")
    if teacher.aligner.by_id and first[0] != own[0]:
        text = (
            f"{shown}: the same vocabulary, but another end of turn, as of a base and an instruct model. It is scored as "
            f"the teacher's. If teachers.{teacher.name}.model ends its answers like the student, its folder has the wrong "
            "eos_token_id or chat template"
        )
        return Finding(name, text, None, "templates")
    return Finding(name, shown, True, "templates")


def _names(processor: VLMProcessor, ids: Sequence[int]) -> str:
    tokens = processor.tokenizer.convert_ids_to_tokens(list(ids))
    return ", ".join(f"{token} ({index})" for token, index in zip(tokens, ids, strict=True))


# ---------------------------------------------------------------------- think blocks


def check_thinking(student: VLMProcessor, teacher: AlignedTeacher, group: Group) -> Finding:
    """Both prompts end with the same kind of think block, or with none."""
    name = f"think block {teacher.name}"
    tails = [prompt_tail(student, group.encoded), prompt_tail(teacher.processor, teacher.encode(group))]
    ours, theirs = map(thinking, tails)
    if ours == theirs:
        return Finding(name, f"both prompts end with {ours} think block", True, "templates")
    text = f"the student's prompt ends with {ours} think block, the teacher's with {theirs}"
    sides = {"student": (student, ours), f"teachers.{teacher.name}": (teacher.processor, theirs)}
    switchable = [where for where, (p, state) in sides.items() if state != "an empty" and _has_switch(p)]
    if "an open" not in (ours, theirs) and not switchable:
        # One is told not to think, the other has no such mode: both answer at once.
        return Finding(name, f"{text}; neither is going to think", True, "templates")
    text += (
        f" ({tails[0][-24:]!r}, {tails[1][-24:]!r}): one answers at once where the other thinks first. Type "
    )
    wanted = [f"'{where}.template={{{_SWITCH}: false}}'" for where in switchable]
    text += (
        " ".join(wanted)
        if wanted
        else f"'teachers.{teacher.name}.template={{VARIABLE: VALUE}}' for its chat template"
    )
    return Finding(name, text, None, "templates")


def _has_switch(processor: VLMProcessor) -> bool:
    return _SWITCH in (processor.template.source or "")


# ---------------------------------------------------------------------- system prompts


def check_system_prompt(student: VLMProcessor, teacher: AlignedTeacher, groups: list[Group]) -> Finding:
    """Neither template adds a system prompt that the other does not, to rows that have none."""
    name = f"system prompt {teacher.name}"
    if all(g.prompt.messages[0]["role"] == "system" for g in groups):
        return Finding(name, "the rows have their own", True, "templates")
    ours, theirs = injected_text(student), injected_text(teacher.processor)
    if ours is None or theirs is None:
        return Finding(name, "a template cannot be probed for one", None, "templates")
    if ours == theirs:
        text = (
            f"both templates write {shorten(repr(ours))}"
            if ours
            else "neither template writes one of its own"
        )
        return Finding(name, text, True, "templates")
    shown = [shorten(repr(text)) if text else "none" for text in (ours, theirs)]
    text = (
        f"the student's template writes {shown[0]}, the teacher's {shown[1]}: they answer under different instructions. "
        'Begin the `messages` of the rows with {"role": "system", "content": "..."}, then both have the same'
    )
    return Finding(name, text, None, "templates")


def injected_text(processor: VLMProcessor) -> str | None:
    """What the template writes before the first user turn by itself, without special tokens and role names; "" =
    nothing, None = it cannot be told."""
    first, answer, second = _PROBES
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    try:
        rendered = processor.template.render(turns, add_generation_prompt=False)
    except ProcessorError:
        return None
    before, found, rest = rendered.partition(first)
    between, found_too, _ = rest.partition(answer)[2].partition(second)
    if not (found and found_too):
        return None
    # A user turn begins the same way everywhere: what stands before that is the template's addition.
    same = zip(before[::-1], between[::-1], strict=False)
    n_head = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
    added = before[: len(before) - n_head]
    for token in processor.tokenizer.added_tokens_decoder.values():
        added = added.replace(token.content, "\n")
    return re.sub(r"^\s*system\b:?", "", added).strip()
