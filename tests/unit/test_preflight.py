"""What is looked at before training: templates, vocabularies, contexts, sampling, the sampler, and pictures."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from rooms import build, load, make_groups, make_prompt, make_teacher, sample
from transformers import Qwen3Config

from uniopd_mm.config import RolloutConfig, TeacherConfig, TrainConfig
from uniopd_mm.engines import LocalEngine, encode_groups
from uniopd_mm.models import context_length
from uniopd_mm.preflight import (
    Finding,
    audit,
    check_coverage,
    check_sampler,
    check_teacher_context,
    check_temperature,
    check_truncation,
    check_vocabularies,
    compare_templates,
    gold_groups,
    judge,
    score_student,
    token_table,
)
from uniopd_mm.preflight.grounding import Audit, Comparison, bootstrap
from uniopd_mm.preflight.tables import why_masked
from uniopd_mm.processors import get_processor
from uniopd_mm.rollout import Group, Rollout, fill
from uniopd_mm.teachers import AlignedTeacher, RemoteTeacher, TeacherPool, TeacherServer
from uniopd_mm.testing import StubServer
from uniopd_mm.training.check import PREFLIGHT_S, choose_prompts, sample_prompts


def make_config(**changes: Any) -> TrainConfig:
    recipe: dict[str, Any] = {
        "out": "unused",
        "steps": 1,
        "student": {"model": "unused", "dtype": "float32"},
        "teachers": {"t": {"model": "unused"}},
        "data": {"train": "unused"},
    }
    return TrainConfig.model_validate({**recipe, **changes})


def variant(folder: Path, source: Path, template: str | None = None, **files: dict[str, Any]) -> Path:
    """The model folder with another template, or other entries in its JSON files."""
    shutil.copytree(source, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    for name, changes in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def teacher_of(folder: Path | Any, student: Any, **settings: Any) -> AlignedTeacher:
    processor = (
        get_processor(folder, template=settings.get("template")) if isinstance(folder, Path) else folder
    )
    return AlignedTeacher("t", TeacherConfig(model="unused", **settings), processor, student)


def pool_of(teacher: AlignedTeacher) -> TeacherPool:
    return TeacherPool({"t": teacher.settings}, {"t": teacher})


def prompt_group(student: Any, *ids: int, finish: str = "length", prompt: Any = None) -> Group:
    """A group with one response of these ids."""
    prompt = prompt or make_prompt(0)
    rollout = Rollout(
        torch.tensor(ids), -torch.ones(len(ids)), finish, student_logprobs=-torch.ones(len(ids))
    )
    group = encode_groups([(0, prompt, prompt.images)], student)[0]
    return replace(group, rollouts=(rollout,))


def compare(student: Any, teacher: AlignedTeacher, **prompt: Any) -> dict[str, Finding]:
    group = prompt_group(student, 20, prompt=replace(make_prompt(0), **prompt))
    return {f.name: f for f in compare_templates(student, pool_of(teacher), [group])}


@pytest.fixture(scope="module")
def text(tiny_models: Mapping[str, Path]) -> Any:
    return get_processor(tiny_models["text"])


@pytest.fixture(scope="module")
def llava(tiny_models: Mapping[str, Path]) -> Any:
    return load(tiny_models["llava"])


PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a poet.<|im_end|>\n{% endif %}"
    + tiny.TEXT_TEMPLATE
)


# ---------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default"}, 40960),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16384}, 40960),
    ],
)
def test_a_context_is_as_long_as_its_positions_were_stretched(rope: dict[str, Any], length: int) -> None:
    config = Qwen3Config(max_position_embeddings=40960, rope_parameters={"rope_theta": 1e6, **rope})
    assert context_length(config) == length


def test_like_templates_give_no_warning(text: Any) -> None:
    findings = compare(text, teacher_of(text, text))
    assert len(findings) == 4 and all(f.ok for f in findings.values())


def test_a_base_student_and_an_instruct_teacher_end_differently(
    text: Any, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = variant(tmp_path / "base", tiny_models["text"], PLAIN, generation_config={"eos_token_id": 0})
    base = get_processor(folder)
    findings = compare(base, teacher_of(text, base))
    assert findings["end of turn t"].ok is None
    assert "<|endoftext|> (0) -> <|im_end|> (2)" in findings["end of turn t"].text
    stop = findings["student's stop"]
    assert stop.ok is None and "never writes" in stop.text and "rollout.stop_token_ids" in stop.text


def test_a_teacher_without_an_end_of_turn_is_said(
    text: Any, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    files = {"generation_config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": None}}
    endless = get_processor(variant(tmp_path / "endless", tiny_models["text"], PLAIN, **files))
    assert endless.stop_token_ids() == []
    finding = compare(text, teacher_of(endless, text))["end of turn t"]
    assert finding.ok is None and "unscored" in finding.text
    own = compare_templates(endless, pool_of(teacher_of(text, endless)), [])
    assert own[0].ok is False and "rollout.stop_token_ids" in own[0].text
    assert compare_templates(endless, pool_of(teacher_of(text, endless)), [], stops=[2])[0].ok is None


def test_a_think_block_on_one_side_is_said_with_what_to_type(
    text: Any, tiny_models: Mapping[str, Path]
) -> None:
    quiet = teacher_of(tiny_models["text"], text, template={"enable_thinking": False})
    finding = compare(text, quiet)["think block t"]
    assert finding.ok is None and "'student.template={enable_thinking: false}'" in finding.text
    finding = compare(quiet.processor, teacher_of(text, quiet.processor))["think block t"]
    assert finding.ok is None and "'teachers.t.template={enable_thinking: false}'" in finding.text


def test_an_open_think_block_differs_from_an_empty_one(
    text: Any, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    thinks = variant(tmp_path / "thinks", tiny_models["text"], tiny.TEXT_TEMPLATE + "<think>\n")
    finding = compare(text, teacher_of(thinks, text))["think block t"]
    assert finding.ok is None and "an open" in finding.text


def test_two_models_that_answer_at_once_are_fine(
    text: Any, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    no_switch = tiny.TEXT_TEMPLATE.replace("enable_thinking", "something")
    student = get_processor(variant(tmp_path / "instruct", tiny_models["text"], no_switch))
    quiet = teacher_of(tiny_models["text"], student, template={"enable_thinking": False})
    finding = compare(student, quiet)["think block t"]
    assert finding.ok is True and "neither is going to think" in finding.text


def test_a_system_prompt_of_one_template_is_said(
    text: Any, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    poet = teacher_of(variant(tmp_path / "poet", tiny_models["text"], SYSTEM), text)
    finding = compare(text, poet)["system prompt t"]
    assert finding.ok is None and "'You are a poet.'" in finding.text and '"role": "system"' in finding.text
    own = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    assert compare(text, poet, messages=own)["system prompt t"].ok is True
    assert compare(poet.processor, teacher_of(poet.processor, poet.processor))["system prompt t"].ok is True


# ---------------------------------------------------------------------- vocabularies, coverage, context


def test_the_same_number_of_other_tokens_is_not_the_same_vocabulary(text: Any, tmp_path: Path) -> None:
    folder = tiny.build_text(tmp_path / "other", tokenizer=tiny.make_tokenizer(seed=1))
    other = get_processor(folder)
    assert len(other.tokenizer) == len(text.tokenizer)
    finding = check_vocabularies(pool_of(teacher_of(other, text)))[0]
    assert (
        "of the same size (512 ids) but different" in finding.text and "stand for different" in finding.text
    )
    assert "scored id by id" in check_vocabularies(pool_of(teacher_of(text, text)))[0].text


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A processor with another vocabulary."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    return get_processor(tiny.build_text(folder, tokenizer=tiny.make_tokenizer(400, seed=1)))


def invalid_ids(processor: Any) -> list[int]:
    """A token that is half a character, many times: bytes that no text holds."""
    return processor.tokenizer.convert_tokens_to_ids(["Ã"]) * 9


def test_low_coverage_is_a_warning_and_none_a_failure(text: Any, foreign: Any) -> None:
    teacher = teacher_of(foreign, text)
    words = text.tokenizer.encode("the answer is red")
    for ids, ok in ((words, True), ([*words, *invalid_ids(text)], None), (invalid_ids(text), False)):
        finding = check_coverage(pool_of(teacher), [prompt_group(text, *ids)])[0]
        assert finding.ok is ok, finding
    assert "0.0% of 9 sampled tokens" in finding.text


def test_prompts_beyond_the_teachers_context_are_counted(
    text: Any, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    group = prompt_group(text, 20)
    short = variant(tmp_path / "short", tiny_models["text"], config={"max_position_embeddings": 100})
    teacher = teacher_of(short, text)

    def look(max_new_tokens: int, teacher: AlignedTeacher = teacher) -> Finding:
        return check_teacher_context(pool_of(teacher), [(group.prompt, ())] * 2, [group], max_new_tokens)[0]

    assert look(10).ok is True
    assert look(90).ok is None and "2 of 2 prompts (100%)" in look(90).text
    assert "rollout.max_new_tokens" in look(90).text
    tiny_context = variant(tmp_path / "tiny", tiny_models["text"], config={"max_position_embeddings": 4})
    assert look(10, teacher_of(tiny_context, text)).ok is False


def test_a_server_that_takes_less_than_its_model_is_believed(text: Any) -> None:
    with StubServer("vllm", lambda ids, images: [-1.0] * (len(ids) - 1), max_model_len=50) as stub:
        settings = TeacherConfig.model_validate(
            {"model": "unused", "server": {"kind": "vllm", "urls": [stub.url]}}
        )
        with TeacherServer("t", settings, text) as server:
            pool = pool_of(RemoteTeacher("t", settings, server, text))
            group = prompt_group(text, 20)
            finding = check_teacher_context(pool, [(group.prompt, ())], [group], 45)[0]
    assert finding.ok is None and "context of 50" in finding.text and "--max-model-len" in finding.text


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("rollout", "scored", "words"),
    [
        ({"temperature": 0.7}, 1.0, ("sharper", "rollout.temperature=1", "loss.score_temperature=0.7")),
        ({"temperature": 1.0}, 0.5, ("flatter",)),
        ({"temperature": 0.0}, 1.0, ("greedy", "same answer")),
    ],
)
def test_a_temperature_that_is_not_scored_is_a_warning(
    rollout: dict[str, float], scored: float, words: tuple[str, ...]
) -> None:
    finding = check_temperature(make_config(rollout=rollout, loss={"score_temperature": scored}))
    assert finding.ok is None and all(word in finding.text for word in words), finding.text


def test_equal_temperatures_are_fine() -> None:
    settings = {"rollout": {"temperature": 0.7}, "loss": {"score_temperature": 0.7}}
    assert check_temperature(make_config(**settings)).ok is True


def test_truncated_sampling_is_a_warning_with_its_size(llava: Any) -> None:
    groups = make_groups(llava, (1, 0))
    assert check_truncation(llava, groups, RolloutConfig()).ok is True
    finding = check_truncation(llava, groups, RolloutConfig(top_k=1, top_p=0.9))
    assert finding.ok is None and "top_p=0.9, top_k=1 cuts" in finding.text
    assert "rollout.top_p=1 rollout.top_k=0" in finding.text
    share = float(finding.text.split("cuts ")[1].split("%")[0])
    assert 50 < share < 100  # a random model's likeliest token is not likely


def test_a_sampler_with_other_weights_fails(llava: Any) -> None:
    groups = sample(llava, make_groups(llava, (1, 0)))
    config = make_config()
    assert check_sampler(llava, groups, config, 1.0).ok is True
    off = fill(groups, "sampler_logprobs", [r.sampler_logprobs + 0.2 for g in groups for r in g.rollouts])
    finding = check_sampler(llava, off, config, 1.0)
    assert finding.ok is False and "do not sample from these weights" in finding.text
    half = config.model_copy(update={"student": config.student.model_copy(update={"dtype": "bfloat16"})})
    assert check_sampler(llava, off, half, 1.0).ok is True  # within what bfloat16 kernels differ by
    stale = make_config(rollout={"server": {"urls": ["http://x:1"], "sync": "never"}})
    assert check_sampler(llava, off, stale, 1.0).ok is None
    broken = fill(
        groups, "sampler_logprobs", [r.sampler_logprobs * math.nan for g in groups for r in g.rollouts]
    )
    assert check_sampler(llava, broken, config, 1.0).ok is False
    assert check_sampler(llava, groups, config, 0.5).ok is False  # other numbers at another temperature
    assert check_sampler(llava, groups, config, None).ok is None


# ---------------------------------------------------------------------- token by token


def test_the_table_lays_spans_side_by_side_and_says_why_tokens_are_masked(text: Any, foreign: Any) -> None:
    teacher = teacher_of(foreign, text)
    image = text.tokenizer.convert_tokens_to_ids("<image>")
    ids = [*text.tokenizer.encode("the answer"), image, *invalid_ids(text)[:1], 10_000]
    group = prompt_group(text, *ids)
    aligned = teacher.aligner.align(ids, "length")
    values = -torch.ones(len(aligned.teacher_ids))
    lp, scored = aligned.to_student(values, group.rollouts[0].student_logprobs)
    rollout = replace(group.rollouts[0], teacher_logprobs=lp, scored=scored)
    table = token_table(replace(group, rollouts=(rollout,)), text, teacher)
    ours = "".join(row.token for row in table.rows if row.teacher_lp is not None)
    theirs = "".join(token for row in table.rows for token in row.teacher_tokens)
    assert ours == theirs == "the answer"
    notes = [row.note for row in table.rows if row.teacher_lp is None]
    assert [note.split(" ")[0] for note in notes] == ["vision", "no", "an"], notes
    out = io.StringIO()
    table.show(out)
    assert "vision token" in out.getvalue() and "masked" in out.getvalue()
    widths = [len(line) for line in out.getvalue().splitlines()]
    assert max(widths) < 130, out.getvalue()


def test_a_special_token_of_the_students_own_is_masked_as_such(text: Any, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]}, replace_extra_special_tokens=False)
    student = get_processor(tiny.build_text(tmp_path / "tools", tokenizer=tokenizer))
    teacher = teacher_of(text, student)
    ids = [student.tokenizer.convert_tokens_to_ids("<|tool|>")]
    rollout = prompt_group(student, *ids).rollouts[0]
    reason = why_masked(0, rollout, teacher.aligner.align(ids, "length"), teacher)
    assert reason == "special token that the teacher has not"


def test_each_reason_to_mask_has_its_words(text: Any, foreign: Any) -> None:
    teacher = teacher_of(foreign, text)
    ids = text.tokenizer.encode("answer")
    aligned = teacher.aligner.align(ids, "length")
    rollout = prompt_group(text, *ids).rollouts[0]
    assert "not finite" in why_masked(0, rollout, aligned, teacher)
    assert why_masked(0, replace(rollout, unscored_reason="lost"), aligned, teacher) == "lost"
    several = replace(aligned, student_span=torch.zeros(2, dtype=torch.int64))
    pair = prompt_group(text, *ids, *ids).rollouts[0]
    exact = teacher_of(foreign, text, align="exact")
    assert "align=exact" in why_masked(0, pair, several, exact)
    departed = replace(
        aligned, student_span=-torch.ones_like(aligned.student_span), problem="changes the text"
    )
    assert why_masked(0, rollout, departed, teacher) == "changes the text"


def test_the_table_says_where_pictures_lie_on_both_sides(llava: Any, tiny_models: Mapping[str, Path]) -> None:
    group = sample(llava, make_groups(llava, (2,)), n=1)[0]
    reader = make_teacher(load(tiny_models["text"]), llava, view="text")
    table = token_table(reader.score([group])[0], llava.processor, reader)
    spans = group.encoded.image_spans
    assert f"2 pictures at tokens (count) {spans[0][0]}..{spans[0][1] - 1} (16)" in table.student_prompt
    assert "no picture (view text)" in table.teacher_prompt


# ---------------------------------------------------------------------- grounding


def grounding(student: Any, teacher: AlignedTeacher, n_images: tuple[int, ...] = (1,) * 5) -> list[Finding]:
    groups = sample(student, make_groups(student, n_images), n=2)
    gold = score_student(student, gold_groups(groups, student.processor), make_config(), 1.0)
    return [f for found in audit(teacher, groups, gold, student.processor) for f in judge(found)]


@pytest.mark.parametrize(
    ("scale", "ok", "words"), [(0.0, False, "does not use"), (10.0, None, "uses the picture")]
)
def test_a_teacher_that_ignores_pictures_is_told_from_one_that_does_not(
    llava: Any, tmp_path: Path, scale: float, ok: bool | None, words: str
) -> None:
    model = load(build("llava", tmp_path / "teacher", seed=3))
    with torch.no_grad():
        for name, weight in model.transformer.named_parameters():
            if "projector" in name:
                weight.mul_(scale)
    finding = grounding(llava, make_teacher(model, llava))[0]
    assert finding.name == "grounding t" and words in finding.text, finding.text
    # Random weights see the picture, but what they make of it is no help.
    assert finding.ok is ok, finding.text


def test_a_reader_is_audited_on_its_descriptions(llava: Any, tiny_models: Mapping[str, Path]) -> None:
    reader = make_teacher(load(tiny_models["text"]), llava, view="text")
    finding = grounding(llava, reader)[0]
    assert "uses the image_text" in finding.text and "leaving it out" in finding.text
    groups = sample(llava, make_groups(llava, (0, 0)), n=1)
    assert audit(reader, groups, [], llava.processor) == []


def test_noise_of_scoring_is_measured_without_the_cache(llava: Any) -> None:
    teacher = make_teacher(llava, llava)
    asked = []

    class Noisy(type(teacher)):
        def score(self, groups: list[Group], *args: Any) -> list[Group]:
            asked.append(self.cache)
            scored = super().score(groups, *args)
            if self.cache is None:
                lps = [r.teacher_logprobs + 0.5 for g in scored for r in g.rollouts]
                return fill(scored, "teacher_logprobs", lps)
            return scored

    teacher.__class__ = Noisy
    teacher.cache = SimpleNamespace(get=lambda *_: None, put=lambda items: list(items))
    groups = sample(llava, make_groups(llava, (1,)), n=2)
    found = audit(teacher, groups, [], llava.processor)[0]
    assert None in asked and found.noise == pytest.approx(0.5, abs=1e-4)
    assert found.threshold == pytest.approx(1.5, abs=1e-3)


def made_audit(view: str = "image", **comparisons: tuple[float, float]) -> Audit:
    """``variant_responses=(change, gain)`` with narrow intervals over 9 prompts."""
    made = [
        Comparison(
            responses=key.split("_")[1],
            variant=key.split("_")[0],
            n_prompts=9,
            n_tokens=90,
            change=(change, change * 0.9, change * 1.1),
            largest=change,
            gain=(gain, gain - 0.02, gain + 0.02),
        )
        for key, (change, gain) in comparisons.items()
    ]
    return Audit("t", view, 0.0, made, [])


def test_verdicts_follow_the_stated_criterion() -> None:
    assert judge(made_audit(grey_gold=(0.5, 0.4)))[0].ok is True
    assert judge(made_audit(grey_gold=(0.5, -0.4), grey_sampled=(0.3, 0.2)))[0].ok is True
    assert judge(made_audit(grey_gold=(0.5, -0.4), grey_sampled=(0.3, 0.0)))[0].ok is None
    assert judge(made_audit(grey_gold=(0.004, 0.004)))[0].ok is False
    undecided = judge(made_audit(grey_gold=(0.0105, 0.0)))[0]
    assert undecided.ok is None and "undecided" in undecided.text and "--prompts" in undecided.text
    few = made_audit(grey_gold=(0.5, 0.4))
    few = replace(few, comparisons=[replace(c, n_prompts=2) for c in few.comparisons])
    assert judge(few)[0].ok is None


def test_the_text_view_is_compared_with_the_picture() -> None:
    def verdict(gain: float) -> Finding:
        return judge(made_audit(grey_gold=(0.5, 0.4), text_gold=(0.5, gain)))[1]

    assert verdict(0.3).ok is None and "image_text loses" in verdict(0.3).text
    assert "better than the picture" in verdict(-0.3).text
    assert verdict(0.0).ok is True
    seen = judge(made_audit("text", none_gold=(0.5, 0.4), image_gold=(0.5, -0.3)))[1]
    assert "image_text loses" in seen.text and "+0.300" in seen.text


def test_a_bootstrap_interval_holds_its_mean_and_narrows() -> None:
    draw = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    mean, low, high = bootstrap(draw)
    assert low < mean < high and bootstrap(draw) == (mean, low, high)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert bootstrap([0.5]) == (0.5, 0.5, 0.5)


# ---------------------------------------------------------------------- what a run looks at


def fake_run(model: Any, prompts: list[Any]) -> Any:
    """What :func:`sample_prompts` takes of a run."""
    return SimpleNamespace(
        config=make_config(rollout={"max_new_tokens": 4}),
        student=model,
        engine=LocalEngine(model),
        train_prompts=prompts,
        trainer=SimpleNamespace(whole_weights=nullcontext),
        world=SimpleNamespace(any=bool),
    )


def test_kinds_of_prompts_take_turns() -> None:
    prompts = [
        make_prompt(n, seed, domain) for seed, (n, domain) in enumerate([(0, "a")] * 3 + [(1, "a"), (0, "b")])
    ]
    assert [p.id for p in choose_prompts(prompts, 4)] == ["p0", "p3", "p4", "p1"]


def test_a_start_looks_at_one_prompt_at_least_and_says_what_it_skipped(llava: Any) -> None:
    run = fake_run(llava, [make_prompt(i % 2, i) for i in range(6)])
    groups, finding = sample_prompts(run, 4, 64, budget_s=0.0)
    assert (
        len(groups) == 1
        and "1 of 4" in finding.text
        and "as many as 0 s allow" in finding.text
        and finding.ok
    )
    groups, finding = sample_prompts(run, 4, 64, budget_s=60.0)
    assert len(groups) == 4 and "allow" not in finding.text
    everything, _ = sample_prompts(run, 4, 64)
    for ours, theirs in zip(groups, everything, strict=True):  # one by one or together: the same rollouts
        assert [r.response_ids.tolist() for r in ours.rollouts] == [
            r.response_ids.tolist() for r in theirs.rollouts
        ]
    assert PREFLIGHT_S == 5.0


def test_data_of_which_nothing_can_be_opened_is_a_failure(llava: Any, tmp_path: Path) -> None:
    gone = [replace(make_prompt(1, i), images=(tmp_path / "gone.png",)) for i in range(3)]
    groups, finding = sample_prompts(fake_run(llava, gone), 4, 64)
    assert groups == [] and finding.ok is False and "none could be opened" in finding.text
