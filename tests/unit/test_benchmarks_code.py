"""The code benchmarks: their two published forms, their tests, and programs that pass and fail them."""

from __future__ import annotations

import base64
import json
import math
import os
import pickle
import shutil
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_rows import FIXTURES, fenced, prompts_of, rows_of
from hypothesis import given
from hypothesis import strategies as st
from tasks import _code as evalplus
from tasks import get_benchmark
from tasks._code import cases_of, header
from tasks.livecodebench import SPLITS

from uniopd_mm.errors import ConfigError, DataError
from uniopd_mm.evaluation.loading import load_rows
from uniopd_mm.verifiers import VerifierPool
from uniopd_mm.verifiers.code import CodeTests
from uniopd_mm.verifiers.packed_tests import unpack

JSONL = FIXTURES / "evalplus_jsonl"


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


@pytest.mark.parametrize(
    ("task", "function", "given", "expected", "second"),
    [
        (558, "digit_distance_nums", [[23, 5], [123, 256]], [9, 7], "digits"),
        (581, "surface_Area", [[3, 4], [4, 5]], [33, 56], "height"),
    ],
)
def test_a_second_reading_of_an_ambiguous_problem_is_accepted(task, function, given, expected, second, pool):
    test = (
        f"def check(candidate):\n    inputs = {given}\n    results = {expected}\n"
        f"    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion({function}(*inp), exp, 0)\n"
    )
    row = {"task_id": task, "code": "pass", "prompt": "p", "test_list": ["assert True"], "test": test}
    benchmark = get_benchmark("mbpp_plus")
    prompt = benchmark.read(row, benchmark.presets["paper"], "strict")
    answers = {
        "digits": "def digit_distance_nums(a, b):\n    n = max(len(str(a)), len(str(b)))\n"
        "    return sum(abs(int(x) - int(y)) for x, y in zip(str(a).zfill(n), str(b).zfill(n)))",
        "height": "def surface_Area(b, h):\n    return round(b * b + 2 * b * ((b / 2) ** 2 + h * h) ** 0.5)",
    }
    wrong = f"def {function}(a, b):\n    return -1"
    outcomes = pool.check([(prompt, fenced(code)) for code in (answers[second], wrong)])
    assert [o.correct for o in outcomes] == [True, False], outcomes


THINK_FIRST = (
    "Write Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.\n"
    "You need to think first then write the Python code."
)


def test_a_function_is_asked_for_in_the_papers_words():
    text = prompts_of("mbpp_plus")[0].messages[-1]["content"]
    question, _, instruction = text.partition("\n\n\n")
    assert question.startswith('"""') and question.endswith('"""') and instruction == THINK_FIRST
    assert "assert shared_values((3, 4, 5),(5, 7, 4)) == (4, 5)" in question
    assert "(1, 2),(3,)" not in question  # one assert is shown, not three


def test_the_own_preset_is_evalplus_protocol():
    (prompt, *_) = prompts_of("mbpp_plus", preset="own")
    text = prompt.messages[-1]["content"]
    assert text.startswith("Please provide a self-contained Python script that solves the following problem")
    assert text.endswith("```") and not get_benchmark("mbpp_plus").presets["own"].template


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
    tests = evalplus.evalplus_tests("row", cases, "f", "")
    assert CodeTests.from_json(tests.to_json()).tests[0].output == 10**5000


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
    assert program.total_limit_s == 61 * 3 + 5  # as LiveCodeBench's judge
    assert (method.style, method.entry_point, len(method.tests)) == ("call", "pairsTo", 3)
    assert method.tests[0].input == [[1, 2, 3], 4] and method.tests[0].output == [[0, 2]]


def test_a_contest_problem_is_asked_in_the_papers_words_which_show_no_starter_code():
    program, method = (p.messages[-1]["content"] for p in prompts_of("livecodebench"))
    assert "def pairsTo" not in method
    for text in (program, method):
        assert text.startswith("You will be given a question (problem specification) and will generate")
        assert text.endswith(f"\n\n\n\n{THINK_FIRST}")


def test_the_own_preset_shows_starter_code_where_there_is_some():
    program, method = prompts_of("livecodebench", preset="own")
    assert [m["role"] for m in program.messages] == ["system", "user"]
    assert "def pairsTo(self, nums" in method.messages[-1]["content"]
    assert "stdout" not in method.messages[-1]["content"] and "stdout" in program.messages[-1]["content"]


def test_the_tests_of_contest_problems_stay_in_their_file():
    prompts, rows = prompts_of("livecodebench"), rows_of("livecodebench")
    assert all(len(p.answer) < 400 for p in prompts)
    assert all(set(row["private_test_cases"]) == {"file", "offset"} for row in rows)
    plain = json.loads((FIXTURES / "livecodebench" / "test6.jsonl").read_text().splitlines()[1])
    benchmark = get_benchmark("livecodebench")
    inline = benchmark.read(plain, benchmark.presets["paper"], "strict")
    assert CodeTests.from_json(inline.answer) == CodeTests.from_json(prompts[1].answer)


def test_tests_of_a_file_that_was_changed_are_not_taken(tmp_path, pool):
    folder = shutil.copytree(FIXTURES / "livecodebench", tmp_path / "livecodebench")
    (first, second) = prompts_of("livecodebench", tmp_path)
    lines = (folder / "test6.jsonl").read_text().splitlines(keepends=True)
    (folder / "test6.jsonl").write_text(lines[1] + lines[0])
    outcomes = pool.check([(prompt, fenced(PROGRAM)) for prompt in (first, second)])
    assert [o.correct for o in outcomes] == [None, None]
    assert "expected 'own1_a'. The file was changed" in outcomes[0].reason
    (folder / "test6.jsonl").unlink()
    assert "cannot be read" in pool.check([(first, fenced(PROGRAM))])[0].reason


def test_a_problem_without_tests_or_with_damaged_ones_is_unknown(pool):
    (row, _) = (json.loads(s) for s in (FIXTURES / "livecodebench" / "test6.jsonl").read_text().splitlines())
    benchmark = get_benchmark("livecodebench")
    for private, says in (("[]", "no tests"), ("eJx", "private_test_cases: private tests cannot be read")):
        broken = dict(row, public_test_cases="[]", private_test_cases=private)
        prompt = benchmark.read(broken, benchmark.presets["paper"], "strict")
        outcome = pool.check([(prompt, fenced(PROGRAM))])[0]
        assert outcome.correct is None and says in outcome.reason
        assert says in pool.check_gold(prompt)


def test_contest_problems_are_read_in_a_fraction_of_the_memory_that_their_tests_take(tmp_path):
    """40 problems of 8 MB unpacked: loading all and unpacking each stays far below the 320 MB of all together."""
    lines = (FIXTURES / "livecodebench" / "test6.jsonl").read_text().splitlines()
    private = [{"input": "7 " * (4 << 20), "output": "1", "testtype": "stdin"}]
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(private)))).decode()
    row = json.loads(lines[0]) | {"private_test_cases": packed}
    (tmp_path / "livecodebench").mkdir()
    file = tmp_path / "livecodebench" / "test6.jsonl"
    file.write_text("".join(json.dumps(row | {"question_id": f"q{i}"}) + "\n" for i in range(40)))
    tracemalloc.start()
    try:
        prompts = prompts_of("livecodebench", tmp_path)
        for prompt in prompts:
            assert CodeTests.from_json(prompt.answer).tests[1].input.startswith("7 7")
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_release_is_all_files_up_to_its_own_and_a_version_is_one_file():
    assert [p.id for p in prompts_of("livecodebench", split="release_v1")] == ["livecodebench/own0_a"]
    assert [p.id for p in prompts_of("livecodebench")] == ["livecodebench/own1_a", "livecodebench/9001"]
    assert SPLITS["release_v6"] == ("test.jsonl", *(f"test{n}.jsonl" for n in range(2, 7)))
    assert SPLITS["v6"] == ("test6.jsonl",) and SPLITS["v1"] == SPLITS["release_v1"] == ("test.jsonl",)


def test_the_number_of_problems_of_each_release_is_known():
    found = [get_benchmark("livecodebench").sources[0]]
    found += [replace(found[0], split=f"release_v{n}") for n in range(1, 7)]
    assert [one.n_rows for one in found] == [175, 400, 511, 612, 713, 880, 1055]
    with pytest.raises(DataError, match="400 rows, 1 were found"):
        load_rows(get_benchmark("livecodebench"), FIXTURES, split="release_v1")


def test_a_release_is_not_read_from_a_part_of_its_files():
    with pytest.raises(
        DataError, match=r"holds no test2\.jsonl(.|\n)*hf download .* --include 'test2.jsonl'"
    ):
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
    monkeypatch.setattr("uniopd_mm.verifiers.packed_tests.MAX_TEST_BYTES", 1000)
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
