"""The text benchmarks: rows of the public files become prompts, and right and wrong answers get the right scores."""

from __future__ import annotations

import base64
import json
import math
import os
import pickle
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tasks import BENCHMARKS, GROUPS, benchmark_names, get_benchmark, task_names
from tasks import _code as evalplus
from tasks._code import cases_of, header
from tasks._text import row_id
from tasks.livecodebench import SPLITS, unpack

from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.evaluation.loading import load_rows
from uniopd_mm.verifiers import VerifierPool, verifier_names
from uniopd_mm.verifiers.code import CodeTests

FIXTURES = Path(__file__).parents[1] / "fixtures" / "benchmarks"
JSONL = FIXTURES / "evalplus_jsonl"
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


def rows_of(name: str, source: Path = FIXTURES, **settings):
    return load_rows(get_benchmark(name), source, check_count=False, **settings)


def prompts_of(
    name: str, source: Path = FIXTURES, preset: str = "paper", profile: str = "strict", **settings
):
    benchmark = get_benchmark(name)
    return [
        benchmark.read(row, benchmark.presets[preset], profile) for row in rows_of(name, source, **settings)
    ]


def fenced(code: str) -> str:
    return f"Here it is.\n```python\n{code}\n```\nDone."


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
    assert set(presets) == {"paper", "quick"}
    paper, quick = presets["paper"], presets["quick"]
    n, temperature = {"humaneval_plus": (1, 0.0), "mbpp_plus": (1, 0.0), "livecodebench": (4, 1.0)}.get(
        name, (32, 1.0)
    )
    sampling = paper.sampling
    assert (paper.n, sampling.temperature, sampling.top_p, sampling.top_k) == (n, temperature, 1.0, 0)
    assert sampling.max_new_tokens == 16384 and paper.limit is None
    assert quick.n <= 4 and quick.limit and quick.sampling.max_new_tokens < 16384
    assert quick.prompt == paper.prompt


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


# evalplus


def whole(name: str, source: Path = FIXTURES) -> list[str]:
    """The reference solution of every row, as an answer would give it."""
    if name == "mbpp_plus":
        return [row.get("code") or row["canonical_solution"] for row in rows_of(name, source)]
    return [row["prompt"] + row["canonical_solution"] for row in rows_of(name, source)]


@pytest.mark.parametrize(
    ("name", "source", "profile"),
    [
        ("humaneval_plus", FIXTURES, "strict"),
        ("humaneval_plus", JSONL, "upstream"),
        ("mbpp_plus", FIXTURES, "upstream"),
        ("mbpp_plus", JSONL, "strict"),
    ],
    ids=["hub", "jsonl", "hub-mbpp", "jsonl-mbpp"],
)
def test_reference_solutions_pass_and_empty_functions_fail(name, source, profile, pool):
    prompts = prompts_of(name, source, profile=profile)
    good = pool.check([(p, fenced(code)) for p, code in zip(prompts, whole(name, source), strict=True)])
    assert [o.correct for o in good] == [True] * len(prompts), good
    names = [CodeTests.from_json(p.answer).entry_point for p in prompts]
    bad = pool.check(
        [(p, fenced(f"def {f}(*given): return None")) for p, f in zip(prompts, names, strict=True)]
    )
    assert [o.correct for o in bad] == [False] * len(prompts), bad


@pytest.mark.parametrize("name", ["humaneval_plus", "mbpp_plus"])
def test_both_published_forms_of_a_problem_are_the_same_tests(name):
    hub, own = prompts_of(name), prompts_of(name, JSONL)
    assert [p.id for p in hub][: len(own)] == [p.id for p in own][: len(hub)]
    for one, other in zip(hub[:1], own[:1], strict=True):
        mine, theirs = CodeTests.from_json(one.answer), CodeTests.from_json(other.answer)
        n = len(theirs.tests)
        assert mine.tests[:n] == theirs.tests and mine.entry_point == theirs.entry_point
        assert (one.messages, mine.atol) == (other.messages, theirs.atol)


def test_an_almost_right_function_fails_on_the_added_tests(pool):
    (prompt, *_) = prompts_of("humaneval_plus")
    code = "def runner_up(values):\n    return sorted(set(values), key=abs)[-2]"
    assert pool.check([(prompt, fenced(code))])[0].correct is False


def test_helpers_and_imports_of_the_prompt_are_there_for_the_answer(pool):
    strict, upstream = (
        prompts_of("humaneval_plus", profile=profile)[1] for profile in ("strict", "upstream")
    )
    code = "def rotate_words(words, by):\n    return [''.join(rotate(c, by) for c in word) for word in words]"
    assert pool.check([(strict, fenced(code))])[0].correct is True
    assert pool.check([(upstream, fenced(code))])[0].correct is False  # evalplus grades the answer alone


def test_the_header_is_all_but_the_function_to_write():
    prompt = "import re\nX = 3\n\ndef helper(a):\n    return a\n\n\ndef f(a):\n    '''Say {}.'''\n"
    found = header(prompt, "f")
    assert "import re" in found and "def helper" in found and "X = 3" in found and "def f" not in found
    assert header("no python here", "f") == ""


def test_values_that_json_has_no_word_for_survive():
    tests = CodeTests.from_json(prompts_of("humaneval_plus")[2].answer)
    assert tests.tests[1].output == (0.0, math.inf) and tests.atol == 1e-4
    first = CodeTests.from_json(prompts_of("mbpp_plus", JSONL)[0].answer).tests[0]
    assert first.input == [(3, 4, 5), (5, 7, 4)] and first.output == (4, 5)


def test_a_match_object_counts_as_found(pool):
    prompt = prompts_of("mbpp_plus", JSONL)[1]
    answers = [
        "import re\ndef text_match_three(t): return re.search(r'\\d-\\d', t)",
        "def text_match_three(t): return '-' in t and t[t.index('-') - 1].isdigit() and t[t.index('-') + 1].isdigit()",
        "def text_match_three(t): return t",
    ]
    assert [o.correct for o in pool.check([(prompt, fenced(a)) for a in answers])] == [True, True, False]


def test_the_instruction_is_evalplus_own():
    (prompt, *_) = prompts_of("mbpp_plus")
    text = prompt.messages[-1]["content"]
    assert text.startswith("Please provide a self-contained Python script that solves the following problem")
    assert "assert shared_values((3, 4, 5),(5, 7, 4)) == (4, 5)" in text and text.rstrip().endswith("```")
    assert "(1, 2),(3,)" not in text  # one assert is shown, not three


def test_expected_outputs_are_computed_once_and_again_where_the_cache_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs = []
    monkeypatch.setattr(evalplus, "_run_reference", lambda *given: runs.append(given) or [(3, {4: math.inf})])
    asked = ("def f(): pass", "f", [[]], "row")
    for _ in range(2):
        assert evalplus.reference_outputs(*asked) == [(3, {4: math.inf})]
    assert len(runs) == 1
    evalplus.reference_outputs("def f(): return 2", *asked[1:])
    assert len(runs) == 2
    for path in tmp_path.rglob("*.json"):
        path.write_text("[1")
    assert evalplus.reference_outputs(*asked) == [(3, {4: math.inf})] and len(runs) == 3


def test_a_reference_that_fails_is_an_error_and_not_a_gold():
    row = dict(rows_of("humaneval_plus", JSONL)[0], canonical_solution="    return 1 / 0\n")
    benchmark = get_benchmark("humaneval_plus")
    with pytest.raises(DataError, match=r"humaneval_plus/0.*reference"):
        benchmark.read(row, benchmark.presets["paper"], "strict")


@pytest.mark.parametrize(
    ("test", "says"),
    [
        ("inputs = [[1]]\nresults = [__import__('os').getpid()]", "literal was expected"),
        ("inputs = [[1]]\nresults = []", "1 inputs and 0 results"),
        ("results = [1]", "no 'inputs"),
        ("inputs = [", "no Python program"),
    ],
)
def test_a_test_program_is_read_and_never_run(test, says):
    with pytest.raises(DataError, match=says):
        cases_of(test, "row")


def test_integers_beyond_pythons_digit_limit_are_read():
    cases = cases_of("inputs = [[1]]\nresults = [1" + "0" * 5000 + "]", "row")
    assert cases.outputs == [10**5000]


def test_a_row_of_no_published_form_is_an_error():
    benchmark = get_benchmark("mbpp_plus")
    row = {"task_id": 2, "prompt": "p", "entry_point": "f", "canonical_solution": "def f(): pass"}
    with pytest.raises(DataError, match="neither the hub's 'test' nor evalplus' base_input"):
        benchmark.read(row, benchmark.presets["paper"], "strict")


# LiveCodeBench

PROGRAM = "n = int(input())\nv = list(map(int, input().split()))\nprint(sum(v))\nprint(max(v))"
METHOD = (
    "class Solution:\n    def pairsTo(self, nums: List[int], k: int) -> List[List[int]]:\n"
    "        return [[i, j] for i in range(len(nums)) for j in range(i + 1, len(nums)) if nums[i] + nums[j] == k]"
)


def test_programs_and_methods_are_judged_by_public_and_private_tests(pool):
    program, method = prompts_of("livecodebench")
    only_public = "n = int(input())\nprint(6)\nprint(3)"
    pairs = [
        (program, PROGRAM),
        (program, only_public),
        (method, METHOD),
        (method, METHOD.replace("i + 1", "i + 2")),
    ]
    outcomes = pool.check([(prompt, fenced(code)) for prompt, code in pairs])
    assert [o.correct for o in outcomes] == [True, False, True, False], outcomes


def test_contest_answers_find_the_imports_that_the_benchmark_gives(pool):
    (program, _) = prompts_of("livecodebench")
    code = PROGRAM.replace("sum(v)", "sum(v) * pow(2, 2, 3) + 0 * len(deque([gcd(4, 6)]))")
    outcome = pool.check([(program, fenced(code))])[0]
    assert outcome.correct is True, (
        outcome
    )  # pow with three arguments is the built-in one, not math's or operator's


def test_an_answer_without_a_closed_fence_fails_a_contest_problem(pool):
    (program, _) = prompts_of("livecodebench")
    assert pool.check([(program, f"```python\n{PROGRAM}")])[0].correct is False


def test_contest_tests_hold_both_columns_and_the_papers_time_limit():
    program, method = (CodeTests.from_json(p.answer) for p in prompts_of("livecodebench"))
    assert (program.style, len(program.tests), program.time_limit_s) == ("stdin", 3, 60.0)
    assert (method.style, method.entry_point, len(method.tests)) == ("call", "pairsTo", 3)
    assert method.tests[0].input == [[1, 2, 3], 4] and method.tests[0].output == [[0, 2]]


def test_starter_code_is_shown_where_there_is_some():
    program, method = (p.messages[-1]["content"] for p in prompts_of("livecodebench"))
    assert "def pairsTo(self, nums" in method and "starter code" not in program


def test_a_release_is_all_files_up_to_its_own_and_a_version_is_one_file():
    assert [p.id for p in prompts_of("livecodebench", split="release_v1")] == ["livecodebench/own0_a"]
    assert [p.id for p in prompts_of("livecodebench")] == ["livecodebench/own1_a", "livecodebench/9001"]
    assert SPLITS["release_v6"] == ("test.jsonl", *(f"test{n}.jsonl" for n in range(2, 7)))
    assert SPLITS["v6"] == ("test6.jsonl",) and SPLITS["v1"] == SPLITS["release_v1"] == ("test.jsonl",)


def test_a_release_is_not_read_from_a_part_of_its_files():
    with pytest.raises(DataError, match=r"test2\.jsonl"):
        rows_of("livecodebench", split="release_v2")
    with pytest.raises(ConfigError, match="release_v6"):
        rows_of("livecodebench", split="test")


def test_scores_are_split_by_difficulty():
    rows = [{"difficulty": "easy"}, {"difficulty": "hard"}]
    result = get_benchmark("livecodebench").aggregate(rows, [[1.0, 0.0], [None, 0.0]])
    assert result == {"score": 0.25, "pass@2": 0.5, "easy": 0.5, "hard": 0.0}


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    "value",
    [Evil(), [Evil()], print, complex(1, 2), os.stat(os.curdir), 7, {"input": "x"}],
    ids=["code", "code in a list", "function", "complex", "stat", "number", "no test"],
)
def test_a_pickle_of_anything_but_plain_tests_is_refused(value):
    text = base64.b64encode(zlib.compress(pickle.dumps(value))).decode()
    with pytest.raises(DataError, match="row"):
        unpack(text, "row")


def test_a_hostile_pickle_is_not_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    with pytest.raises(DataError, match="wants to load"):
        unpack(base64.b64encode(zlib.compress(pickle.dumps(Touch()))).decode(), "row")
    assert not (tmp_path / "ran").exists()


def test_tests_nested_without_end_are_refused():
    deep = base64.b64encode(zlib.compress(pickle.dumps("[" * 200_000))).decode()
    with pytest.raises(DataError, match="row"):
        unpack(deep, "row")
    with pytest.raises(DataError, match="row"):
        unpack("[" * 200_000, "row")


def test_tests_that_unpack_to_too_much_are_refused(monkeypatch):
    monkeypatch.setattr("tasks.livecodebench.MAX_TEST_BYTES", 1000)
    bomb = base64.b64encode(zlib.compress(pickle.dumps("[" + " " * 100_000 + "]"))).decode()
    with pytest.raises(DataError, match="more than 1000 bytes"):
        unpack(bomb, "row")


@given(st.binary(max_size=60), st.booleans())
def test_damaged_private_tests_are_a_data_error(data, compressed):
    text = base64.b64encode(zlib.compress(data) if compressed else data).decode()
    try:
        assert unpack(text, "row") == []  # nothing at all is no tests
    except DataError as error:
        assert str(error).startswith("row")


@given(
    st.lists(st.fixed_dictionaries({"input": st.text(), "output": st.text()}), max_size=4), st.integers(0, 5)
)
def test_packed_and_plain_tests_are_the_same(tests, protocol):
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests), protocol))).decode()
    assert unpack(packed, "row") == unpack(json.dumps(tests), "row") == tests


def test_the_fixtures_are_what_their_script_writes(tmp_path, monkeypatch):
    import runpy

    script = shutil.copy(FIXTURES / "make_text.py", tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    written = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.jsonl"))
    assert len(written) >= 6
    assert all((tmp_path / p).read_bytes() == (FIXTURES / p).read_bytes() for p in written)
