"""Looking before training: all of it for ``--check``, and in about five seconds at every start of a run."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from uniopd_mm.engines import ServerEngine, encode_groups
from uniopd_mm.errors import DataError
from uniopd_mm.preflight import (
    Audit,
    Finding,
    TokenTable,
    Topic,
    audit,
    check_context,
    check_coverage,
    check_head,
    check_sampler,
    check_servers,
    check_teacher_context,
    check_temperature,
    check_truncation,
    check_views,
    check_vocabularies,
    compare_templates,
    gold_groups,
    judge,
    null_test,
    require_ok,
    score_student,
    served_groups,
    token_table,
)
from uniopd_mm.prompts import open_images
from uniopd_mm.rollout import Group, Prompt

if TYPE_CHECKING:
    from uniopd_mm.training.run import Run

PREFLIGHT_S = 5.0
"""Seconds that the checks at the start of a run may take, about."""
START_PROMPTS, START_TOKENS = 8, 16
"""Prompts, and tokens of a response, that a run looks at before it starts, if there is time."""
CHECK_PROMPTS, CHECK_TOKENS = 16, 64
"""The same for ``--check``."""
PROMPTS_READ = 256
"""Prompts from the beginning of the data among which those are chosen, and which are measured by ``--check``."""
GOLD_ANSWERS_CHECKED, GOLD_ANSWERS_AT_START = 1000, 100
"""Rows whose gold answers ``--check`` gives to their verifiers."""


@dataclass
class Report:
    """What a look found."""

    findings: list[Finding] = field(default_factory=list)
    tables: list[TokenTable] = field(default_factory=list)
    audits: list[Audit] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        return all(f.ok is not False for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.is_ok,
            "findings": [asdict(f) for f in self.findings],
            "examples": [table.as_json() for table in self.tables],
            "grounding": [found.as_json() for found in self.audits],
        }

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_finite(self.as_json()), indent=1, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------------- the two looks


def check(run: Run, command: Sequence[str], only: Topic | None = None, n_prompts: int = CHECK_PROMPTS) -> int:
    """``--check``: everything that can be looked at without training, or one topic of it.  Exit status.

    ``command``: what was typed, to print how to train; its options are left out.
    """
    report = Report()
    wanted = get_args(Topic) if only is None else (only,)
    groups, looked_at = sample_prompts(run, n_prompts, CHECK_TOKENS)
    report.findings.append(looked_at)
    if groups:
        for topic in wanted:
            report.findings += look_at(run, groups, topic)
            if topic == "alignment":
                report.tables = examples(run, groups)
        if "grounding" in wanted:
            report.audits, verdicts = audit_grounding(run, groups)
            report.findings += verdicts
    elif "data" in wanted:
        report.findings += look_at_data(run)
    _show(run, report)
    if run.world.is_main:
        path = run.out / "check" / "report.json"
        report.write(path)
        run.console.note(f"report  {path}")
        words = [word for word in command if not word.startswith("--")]
        print(f"train with: deepspeed {shlex.join(words)}")  # in one line, to be copied
    return 0 if report.is_ok else 1


def require_preflight(run: Run) -> None:
    """The cheap checks at the start of a run; it does not start when one fails."""
    began = time.monotonic()
    groups, looked_at = sample_prompts(run, START_PROMPTS, START_TOKENS, PREFLIGHT_S)
    findings = [looked_at]
    if groups:
        for topic in ("models", "templates", "alignment", "sampling"):
            findings += look_at(run, groups, topic, at_start=True)
    findings.append(check_gold_answers(run, GOLD_ANSWERS_AT_START))
    for finding in findings:
        if finding.ok is not True:
            run.console.check(finding.name, finding.text, finding.ok)
    fine = [f.name for f in findings if f.ok is True and f is not looked_at]
    text = f"{', '.join(fine)} ({looked_at.text}; {time.monotonic() - began:.1f} s; --check looks at more)"
    run.console.check("before training", text, True)
    require_ok(findings)


def look_at(run: Run, groups: list[Group], topic: Topic, at_start: bool = False) -> list[Finding]:
    """The findings of one topic on sampled prompts; every rank makes the same ones.  ``at_start``: the cheap ones."""
    config, pool = run.config, run.teachers
    if topic == "data":
        return look_at_data(run)
    if topic == "models":
        some = [(g.prompt, g.images) for g in groups]
        limit = config.rollout.max_new_tokens
        with run.trainer.whole_weights():
            findings = [check_head(run.student, groups), check_context(run.student, groups, limit)]
        first = some if at_start else _opened(run.train_prompts[:PROMPTS_READ])
        return [*findings, *check_servers(pool), *check_teacher_context(pool, first, groups, limit)]
    if topic == "templates":
        stops = config.rollout.stop_token_ids
        return [*check_views(pool, groups), *compare_templates(run.student.processor, pool, groups, stops)]
    if topic == "alignment":
        findings = [*check_vocabularies(pool), *check_coverage(pool, groups)]
        with run.trainer.whole_weights():
            return findings + [
                null_test(run.student, teacher, served, config)
                for teacher, served in served_groups(pool, groups)
            ]
    if topic == "sampling":
        with run.trainer.whole_weights():
            findings = [check_temperature(config), check_truncation(run.student, groups, config.rollout)]
            if isinstance(run.engine, ServerEngine):
                findings.append(Finding("rollout server", run.engine.report, True, "sampling"))
                temperature = run.engine.logprob_temperature(config.rollout)
                findings.append(check_sampler(run.student, groups, config, temperature))
        return findings
    return []


# ---------------------------------------------------------------------- what is looked at


def sample_prompts(
    run: Run, n_prompts: int, max_new_tokens: int, budget_s: float | None = None
) -> tuple[list[Group], Finding]:
    """Two rollouts each of the first prompts, every domain and number of images in turn, sampled by the student.

    With ``budget_s`` one prompt after another, until half of the seconds are gone: the checks of what was sampled take
    no longer than sampling it did.  At least one prompt is looked at.
    """
    config, began = run.config, time.monotonic()
    short = config.rollout.model_copy(
        update={"max_new_tokens": min(max_new_tokens, config.rollout.max_new_tokens)}
    )
    chosen = list(enumerate(choose_prompts(run.train_prompts[:PROMPTS_READ], n_prompts)))
    groups: list[Group] = []
    failed: list[str] = []
    n_tried = 0
    with run.trainer.whole_weights():
        for part in [chosen] if budget_s is None else [[one] for one in chosen]:
            encoded = [g for slot, prompt in part for g in _encode(run, slot, prompt)]
            n_tried += len(part)
            if encoded:
                groups += run.engine.sample(encoded, 2, short, (config.seed, 0))
                failed += run.engine.failed
            if budget_s is not None and run.world.any(time.monotonic() - began > budget_s / 2):
                break
        groups = [g for g in groups if g.rollouts]
        groups = score_student(run.student, groups, config, config.loss.score_temperature)
    text = f"{len(groups)} of {len(chosen)} chosen prompts looked at"
    if n_tried < len(chosen):
        text += f", as many as {budget_s:g} s allow"
    if failed:
        text += f"; {len(failed)} rollouts failed: {failed[0]}"
    if groups:
        return groups, Finding("prompts", text, None if failed else True, "data")
    text += f": of the first {PROMPTS_READ} rows none could be opened and answered; skipped.jsonl and the rows say why"
    return [], Finding("prompts", text, False, "data")


def choose_prompts(prompts: Sequence[Prompt], n: int) -> list[Prompt]:
    """``n`` prompts, each kind (domain, number of images) in turn, in their order."""
    kinds: dict[tuple[str, int], list[Prompt]] = {}
    for prompt in prompts:
        kinds.setdefault((prompt.domain, len(prompt.images)), []).append(prompt)
    turns = zip_longest(*kinds.values())
    return [prompt for turn in turns for prompt in turn if prompt is not None][:n]


def _encode(run: Run, slot: int, prompt: Prompt) -> list[Group]:
    with contextlib.suppress(DataError):  # skipped and counted when its turn comes
        return encode_groups([(slot, prompt, open_images(prompt))], run.student.processor)
    return []


def _opened(prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, tuple[Any, ...]]]:
    for prompt in prompts:
        with contextlib.suppress(DataError):
            yield prompt, open_images(prompt)


def look_at_data(run: Run) -> list[Finding]:
    """How many rows there are, and whether their gold answers can be used."""
    findings = []
    for name, prompts in (("data train", run.train_prompts), ("data eval", run.eval_prompts)):
        if prompts is not None:
            domains = ", ".join(f"{d} {n}" for d, n in sorted(prompts.domains().items()))
            text = f"{len(prompts)} prompts ({domains}), {len(prompts.bad_rows)} bad rows"
            rows = [f"{row.source}: {row.reason}" for row in prompts.bad_rows[:5]]
            findings.append(Finding(name, "; ".join([text, *rows]), None if rows else True, "data"))
    return [*findings, check_gold_answers(run)]


def check_gold_answers(run: Run, n: int = GOLD_ANSWERS_CHECKED) -> Finding:
    """Gold answers that their verifiers can use; the rest would give unknown outcomes for ever."""
    some = run.train_prompts[:n]
    answered = [prompt for prompt in some if prompt.answer is not None]
    whys = zip(answered, run.verifiers.check_golds(answered), strict=True)
    unusable = [f"{prompt.source}: {why}" for prompt, why in whys if why]
    text = f"{len(answered) - len(unusable)} of the first {len(some)} prompts' can be verified"
    none = [f"{len(some) - len(answered)} have none"] if len(answered) < len(some) else []
    is_ok = len(unusable) <= run.config.data.max_bad_share * len(some)
    return Finding("gold answers", "; ".join([text, *none, *unusable[:5]]), is_ok, "data")


def examples(run: Run, groups: list[Group]) -> list[TokenTable]:
    """One rollout for each teacher, of a prompt with pictures where there is one."""
    tables = []
    for teacher, served in served_groups(run.teachers, groups):
        if served:
            group = max(served, key=lambda g: bool(g.prompt.images))
            scored = teacher.score([group], run.config.loss.score_temperature)[0]
            tables.append(token_table(scored, run.student.processor, teacher))
    return tables


def audit_grounding(run: Run, groups: list[Group]) -> tuple[list[Audit], list[Finding]]:
    """What each teacher makes of pictures, and the verdicts."""
    config, processor = run.config, run.student.processor
    with run.trainer.whole_weights():
        gold = score_student(
            run.student, gold_groups(groups, processor), config, config.loss.score_temperature
        )
    answers = {g.prompt.id: g for g in gold}
    audits: list[Audit] = []
    for teacher, served in served_groups(run.teachers, groups):
        known = [answers[g.prompt.id] for g in served if g.prompt.id in answers]
        audits += audit(teacher, served, known, processor, config.loss.score_temperature)
    findings = [finding for found in audits for finding in judge(found)]
    if not audits:
        text = "no prompt that was looked at shows a teacher a picture, or describes it"
        findings = [Finding("grounding", text, None, "grounding")]
    return audits, findings


# ---------------------------------------------------------------------- showing


def _show(run: Run, report: Report) -> None:
    console = run.console
    for topic in get_args(Topic):
        found = [f for f in report.findings if f.topic == topic]
        if found:
            console.note("")
            console.note(topic)
        for finding in found:
            console.check(finding.name, finding.text, finding.ok)
        if not run.world.is_main:
            continue
        for shown in {"alignment": report.tables, "grounding": report.audits}.get(topic, []):
            console.note("")
            shown.show()
    console.note("")
    n_failed = sum(f.ok is False for f in report.findings)
    n_open = sum(f.ok is None for f in report.findings)
    console.note(f"{len(report.findings)} checks: {n_failed} failed, {n_open} to be read")


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
