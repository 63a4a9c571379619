"""The text benchmarks: rows of the public files become prompts, and right and wrong answers get the right scores."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from benchmark_rows import FIXTURES, prompts_of, rows_of
from evaluating import GREEDY, world
from hypothesis import given
from hypothesis import strategies as st
from tasks import BENCHMARKS, GROUPS, benchmark_names, get_benchmark, task_names
from tasks._text import row_id

from uniopd_mm.config import ModelConfig
from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.evaluation import session
from uniopd_mm.evaluation.generate import generate
from uniopd_mm.evaluation.loading import load_rows
from uniopd_mm.evaluation.session import Answerer, Request
from uniopd_mm.processors import get_processor
from uniopd_mm.verifiers import VerifierPool, verifier_names

MATH = GROUPS["text_math"]
TEXT = (*MATH, *GROUPS["code"])
N_ROWS = {
    "aime24": 2,
    "aime25": 2,
    "hmmt_feb25": 2,
    "hmmt_nov25": 2,
    "humaneval_plus": 4,
    "mbpp_plus": 2,
    "livecodebench": 2,
}


@pytest.fixture(scope="module")
def pool():
    with VerifierPool() as pool:
        yield pool


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """No test reads or fills the user's own cache of expected outputs."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


# The registry


def test_the_sixteen_benchmarks_are_listed_in_the_papers_order():
    assert len(GROUPS["paper"]) == 16 and GROUPS["paper"][0] == "aime24" and GROUPS["paper"][-1] == "infovqa"
    assert benchmark_names()[:16] == list(GROUPS["paper"]) and "quickstart" in benchmark_names()


@pytest.mark.parametrize("name", TEXT)
def test_a_benchmark_is_found_by_the_name_that_it_has(name):
    benchmark = get_benchmark(name)
    assert benchmark.name == name and benchmark is BENCHMARKS[name] and name in GROUPS[benchmark.domain]


def test_a_misspelt_benchmark_gets_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean 'humaneval_plus'"):
        get_benchmark("humaneval-plus")
    with pytest.raises(KeyError):
        BENCHMARKS["nothing"]


def test_groups_and_names_may_be_mixed_and_count_once():
    assert task_names("code, aime24,text_math") == [*GROUPS["code"], *MATH]
    assert task_names("all") == task_names("paper") == list(GROUPS["paper"])
    with pytest.raises(ConfigError, match="Did you mean 'image_math'"):
        task_names("aime24,imagemath")


# Loading and reading


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("preset", ["paper", "quick"])
def test_every_row_of_the_public_files_becomes_a_prompt(name, preset):
    prompts = prompts_of(name, preset=preset)
    assert len(prompts) == N_ROWS[name] == len({p.id for p in prompts})
    for prompt in prompts:
        assert prompt.id.startswith(f"{name}/") and prompt.domain == get_benchmark(name).domain
        assert isinstance(prompt.answer, str) and prompt.answer and prompt.verifier
        assert [m["role"] for m in prompt.messages] == ["user"] and "{" + "question}" not in str(
            prompt.messages
        )


@pytest.mark.parametrize("name", TEXT)
def test_ids_do_not_depend_on_order_preset_or_profile(name):
    ids = [p.id for p in prompts_of(name)]
    assert ids == [p.id for p in prompts_of(name, preset="quick", profile="upstream")]
    benchmark = get_benchmark(name)
    read = [benchmark.read(row, benchmark.presets["paper"], "strict").id for row in reversed(rows_of(name))]
    assert read == ids[::-1]


@pytest.mark.parametrize("name", TEXT)
def test_each_profile_names_a_verifier_that_there_is(name):
    strict, upstream = ({p.verifier for p in prompts_of(name, profile=x)} for x in ("strict", "upstream"))
    expected = dict.fromkeys(MATH, "math:upstream") | {"livecodebench": "code:livecodebench"}
    assert upstream == {expected.get(name, "code:evalplus")} and upstream <= set(verifier_names())
    assert strict == {"math" if name in MATH else "code"}


@pytest.mark.parametrize("name", TEXT)
def test_a_file_without_a_column_is_refused_by_the_name_of_the_column(name, tmp_path):
    benchmark = get_benchmark(name)
    missing = benchmark.columns[-1]
    rows = [{k: v for k, v in row.items() if k != missing} for row in rows_of(name)]
    folder = tmp_path / name
    folder.mkdir()
    for file in {
        "livecodebench": ("test6.jsonl",),
        "humaneval_plus": ("HumanEvalPlus.jsonl",),
        "mbpp_plus": ("MbppPlus.jsonl",),
    }.get(name, ("train.jsonl",)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=f"no column {missing}"):
        load_rows(benchmark, tmp_path, check_count=False)


@pytest.mark.parametrize("name", TEXT)
def test_a_part_of_the_rows_is_not_taken_for_the_benchmark(name):
    benchmark = get_benchmark(name)
    expected = dict.fromkeys(MATH, 30) | {"humaneval_plus": 164, "mbpp_plus": 378, "livecodebench": 175}
    assert benchmark.n_rows == expected[name]
    with pytest.raises(DataError, match=f"{benchmark.n_rows} rows, {N_ROWS[name]} were found"):
        load_rows(benchmark, FIXTURES)


@pytest.mark.parametrize("name", TEXT)
def test_the_presets_are_the_papers_protocol_and_a_quick_look(name):
    presets = get_benchmark(name).presets
    assert set(presets) == {"paper", "quick"} | ({"own"} if name in GROUPS["code"] else set())
    paper, quick = presets["paper"], presets["quick"]
    n = 4 if name in GROUPS["code"] else 32
    sampling = paper.sampling
    assert (paper.n, sampling.temperature, sampling.top_p, sampling.top_k) == (n, 1.0, 1.0, 0)
    assert sampling.max_new_tokens == 16384 and paper.limit is None
    assert quick.n <= 4 and quick.limit and quick.sampling.max_new_tokens < 16384
    assert quick.prompt == paper.prompt
    assert quick.template == paper.template == {"enable_thinking": False}


def test_a_system_prompt_of_a_preset_comes_first():
    benchmark = get_benchmark("aime24")
    preset = replace(benchmark.presets["paper"], system="Think.")
    (row, *_) = rows_of("aime24")
    assert [m["role"] for m in benchmark.read(row, preset, "strict").messages] == ["system", "user"]


def test_an_id_falls_back_to_the_problem_itself():
    first, second = ({"problem": text, "answer": 1} for text in ("p", "q"))
    assert row_id("x", {"id": 0}, "id") == "x/0"
    assert row_id("x", first, "id") == row_id("x", dict(first), "id") != row_id("x", second, "id")


def test_a_row_without_an_answer_is_an_error():
    benchmark = get_benchmark("aime24")
    with pytest.raises(DataError, match="no 'answer'"):
        benchmark.read({"id": 1, "problem": "p", "answer": None}, benchmark.presets["paper"], "strict")


# How it is asked


@pytest.mark.parametrize(
    ("typed", "thinks"), [({}, False), ({"enable_thinking": True}, True), ({"color": "red"}, False)]
)
def test_presets_switch_thinking_off_and_what_is_typed_wins(
    typed, thinks, tiny_models, tmp_path, monkeypatch
):
    benchmark = get_benchmark("aime24")
    preset = replace(benchmark.presets["paper"], n=1, limit=1, sampling=GREEDY)
    request = Request("aime24", preset, tmp_path, benchmark, source=FIXTURES)
    asked = []

    def noting(engine, processor, *more, **options):
        asked.append(processor)
        return generate(engine, processor, *more, **options)

    monkeypatch.setattr(session, "generate", noting)
    model = ModelConfig(model=str(tiny_models["text"]), dtype="float32", template=typed)
    with Answerer(model, world()) as answerer:
        task = request.load()
        settings, _ = answerer.answer(task, request)
        plain = answerer.parts()[1].encode(task.prompts[0].messages)
    assert settings["template"] == {"enable_thinking": False} | typed
    (processor,) = asked
    text = processor.tokenizer.decode(processor.encode(task.prompts[0].messages).input_ids)
    assert ("<think>\n\n</think>" not in text) is thinks
    assert "<think>" not in processor.tokenizer.decode(plain.input_ids)  # others' prompts are as they were


def test_a_variable_that_a_template_does_not_know_changes_nothing(tiny_models):
    processor = get_processor(tiny_models["text"])
    messages = [{"role": "user", "content": "6 * 7"}]
    changed = processor.with_template({"unheard_of": False}).encode(messages)
    assert changed.input_ids.tolist() == processor.encode(messages).input_ids.tolist()


# Mathematics


def test_the_problem_is_asked_in_the_papers_words():
    (prompt, *_) = prompts_of("aime24")
    assert prompt.messages[-1]["content"] == (
        "Find the remainder when $2^{10}$ is divided by $1000$.\n"
        "Please reason step by step, and put your final answer within \\boxed{}."
    )


def test_integer_answers_become_text():
    assert [type(row["answer"]) for row in rows_of("aime25")] == [int, int]
    assert [p.answer for p in prompts_of("aime25")] == ["56", "54"]


RIGHT = {
    "aime24": ["24", "190"],
    "aime25": ["56", "54"],
    "hmmt_feb25": ["\\sqrt{3}/2", "2^6"],
    "hmmt_nov25": ["56", "\\frac{1+\\sqrt{7}}{2}"],
}
"""Answers that are right without being written as the gold is."""


@pytest.mark.parametrize("name", MATH)
@pytest.mark.parametrize("profile", ["strict", "upstream"])
def test_right_and_wrong_mathematics_are_told_apart(name, profile, pool):
    prompts = prompts_of(name, profile=profile)
    right = RIGHT[name]
    if (name, profile) == ("hmmt_nov25", "upstream"):
        prompts, right = prompts[:1], right[:1]
    good = pool.check([(p, f"So \\boxed{{{answer}}}.") for p, answer in zip(prompts, right, strict=True)])
    bad = pool.check([(p, "So \\boxed{12345}.") for p in prompts])
    assert [o.correct for o in good] == [True] * len(prompts), good
    assert [o.correct for o in bad] == [False] * len(prompts)


def test_the_gold_without_its_backslash_is_repaired_in_strict_and_kept_in_upstream(pool):
    answer = "\\boxed{\\frac{\\sqrt{7} + 1}{2}}"
    strict, upstream = (prompts_of("hmmt_nov25", profile=profile)[1] for profile in ("strict", "upstream"))
    assert upstream.answer == "\\frac{sqrt{7} + 1}{2}"  # read as s*q*r*t*7: nobody's answer is that
    assert strict.answer == "\\frac{\\sqrt{7} + 1}{2}"
    assert [o.correct for o in pool.check([(strict, answer), (upstream, answer)])] == [True, False]


def test_mathematics_is_averaged_over_all_samples_with_unknown_ones_as_wrong():
    aggregate = get_benchmark("aime24").aggregate
    assert aggregate([{}, {}], [[1.0, None, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]) == {
        "score": 0.625,
        "avg@4": 0.625,
        "pass@4": 1.0,
        "maj@4": 0.5,
    }
    assert aggregate([], []) == {}


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, None]), min_size=4, max_size=4), min_size=1, max_size=8))
def test_the_average_lies_between_always_and_ever_right(scores):
    result = get_benchmark("aime24").aggregate([{}] * len(scores), scores)
    always = sum(all(score == 1 for score in row) for row in scores) / len(scores)
    assert always - 1e-12 <= result["score"] <= result["pass@4"] + 1e-12


def test_the_fixtures_are_what_their_script_writes(tmp_path, monkeypatch):
    import runpy

    script = shutil.copy(FIXTURES / "make_text.py", tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    written = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.jsonl"))
    assert len(written) >= 6
    assert all((tmp_path / p).read_bytes() == (FIXTURES / p).read_bytes() for p in written)
