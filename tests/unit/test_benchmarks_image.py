"""The image benchmarks on fixtures in the schemas of the public data sets: rows, prompts, scores, aggregates."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from tasks import GROUPS, benchmark_names, get_benchmark

from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.loading import load_rows
from uniopd_mm.prompts import open_images
from uniopd_mm.verifiers import VerifierPool, get_verifier, verifier_names
from uniopd_mm.verifiers.choice import options_of

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "benchmarks"
NAMES = [*GROUPS["image_math"], *GROUPS["image_logic"], *GROUPS["chart_document"]]
PARQUET = [name for name in NAMES if name != "visulogic"]
WAYS = [(preset, profile) for preset in ("paper", "quick") for profile in ("strict", "upstream")]
N_FIXTURE_ROWS = dict(zip(NAMES, (4, 5, 6, 4, 3, 3, 4, 3, 2), strict=True))

# Per benchmark and row: an answer that is right, one that is wrong.
ANSWERS = {
    "mathvision": [("C", "D"), ("15", "16"), ("\\frac{1}{4}", "\\frac{1}{8}"), ("B", "A")],
    "dynamath": [("5.000", "5.1"), ("5.385", "5.4"), ("A", "B"), ("B", "A"), ("rise", "fall")],
    "wemath": [("B", "A")] * 6,
    "logicvista": [("B", "A"), ("A, C", "B"), ("C", "A"), ("A", "B")],
    "visulogic": [("A", "B"), ("B", "C"), ("C", "D")],
    "ai2d": [("C", "A"), ("A", "B"), ("B", "C")],
    "chartqa": [("Blue", "Red"), ("200", "300"), ("2010", "1500"), ("14%", "20%")],
    "docvqa": [("J. Doe", "John Smith"), ("1,200", "77"), ("pears", "onions")],
    "infovqa": [("40%", "65%"), ("coffee", "tea")],
}


@pytest.fixture(scope="module")
def pool():
    with VerifierPool() as verifiers:
        yield verifiers


def rows_of(name: str, source: Path = FIXTURES):
    return list(load_rows(get_benchmark(name), source, check_count=False))


def prompts_of(name: str, preset: str = "paper", profile: str = "strict", rows=None):
    benchmark = get_benchmark(name)
    return [benchmark.read(row, benchmark.presets[preset], profile) for row in rows or rows_of(name)]


def user_text(prompt) -> str:
    return "|".join(part.get("text", "<IMAGE>") for part in prompt.messages[-1]["content"])


def fixture_maker():
    spec = importlib.util.spec_from_file_location("make_image", FIXTURES / "make_image.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_every_fixture_becomes_prompts_with_one_picture_that_opens(name):
    rows = rows_of(name)
    assert len(rows) == N_FIXTURE_ROWS[name]
    for preset, profile in WAYS:
        prompts = prompts_of(name, preset, profile, rows)
        assert len({prompt.id for prompt in prompts}) == len(rows)
        for prompt in prompts:
            assert prompt.id.startswith(f"{name}/")
            assert sum(part["type"] == "image" for part in prompt.messages[-1]["content"]) == 1
            assert prompt.verifier in verifier_names()
            assert prompt.domain == get_benchmark(name).domain
            assert get_verifier(prompt.verifier).check_gold(prompt) is None
            (picture,) = open_images(prompt)
            assert picture.mode == "RGB" and picture.width >= 64


@pytest.mark.parametrize("name", NAMES)
def test_pictures_stay_encoded_and_are_not_copied(name):
    rows = rows_of(name)
    column = next(key for key, value in rows[0].items() if isinstance(value, dict) and "bytes" in value)
    for row, prompt in zip(rows, prompts_of(name, rows=rows), strict=True):
        assert prompt.images == (row[column]["bytes"],)
        assert prompt.images[0] is row[column]["bytes"]


@pytest.mark.parametrize("name", PARQUET)
def test_fixtures_have_the_features_that_datasets_decodes(name, tmp_path):
    from datasets import Dataset, Image
    from PIL.Image import Image as Picture

    path = FIXTURES / name / fixture_maker().FILES[name]
    found = Dataset.from_parquet(str(path), cache_dir=str(tmp_path))
    (column,) = [key for key, feature in found.features.items() if isinstance(feature, Image)]
    assert isinstance(found[0][column], Picture)


@pytest.mark.parametrize("name", NAMES)
def test_a_split_with_another_number_of_rows_is_refused(name):
    with pytest.raises(DataError, match=f"{get_benchmark(name).n_rows}"):
        load_rows(get_benchmark(name), FIXTURES)


@pytest.mark.parametrize("name", PARQUET)
def test_a_column_that_is_not_there_is_named(name, tmp_path):
    maker = fixture_maker()
    missing = get_benchmark(name).columns[1]
    rows = [{k: v for k, v in row.items() if k != missing} for row in rows_of(name)]
    maker.write_parquet(tmp_path / name / maker.FILES[name], name, rows)
    with pytest.raises(DataError, match=f"no column {missing}"):
        rows_of(name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_its_picture_is_a_data_error(name):
    row = {k: None if isinstance(v, dict) else v for k, v in rows_of(name)[0].items()}
    with pytest.raises(DataError, match="image"):
        prompts_of(name, rows=[row])


@pytest.mark.parametrize(("preset", "profile"), WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_right_answers_score_and_wrong_ones_do_not(name, preset, profile, pool):
    prompts = prompts_of(name, preset, profile)
    tagged = get_benchmark(name).presets[preset].system is not None
    shape = "<think>because</think>\n<answer>{}</answer>" if tagged else "{}"
    if name == "dynamath" and not tagged:
        shape = '{{"solution": "because", "short answer": "{}"}}'
    if name == "mathvision" and not tagged:
        shape = "So it is \\boxed{{{}}}."
    answers = ANSWERS[name]
    if name == "logicvista" and profile == "upstream" and tagged:
        answers = [answers[0], ("A", "B"), *answers[2:]]  # the recipe compares with the first letter alone
    right = pool.check([(p, shape.format(a)) for p, (a, _) in zip(prompts, answers, strict=True)])
    wrong = pool.check([(p, shape.format(a)) for p, (_, a) in zip(prompts, answers, strict=True)])
    assert [outcome.correct for outcome in right] == [True] * len(prompts)
    assert [outcome.correct for outcome in wrong] == [False] * len(prompts)


@pytest.mark.parametrize("name", NAMES)
def test_both_presets_are_greedy_and_leave_room_to_think(name):
    presets = get_benchmark(name).presets
    assert presets["paper"].sampling.max_new_tokens == 49152 and presets["paper"].limit is None
    assert 512 <= presets["quick"].sampling.max_new_tokens <= 4096
    assert {preset.sampling.temperature for preset in presets.values()} == {0.0}


def test_each_reasoning_task_gets_the_system_prompt_that_lmms_eval_gives_it():
    systems = {name: get_benchmark(name).presets["paper"].system for name in NAMES}
    think = {name for name, system in systems.items() if system and "<think>" in system}
    analysis = {name for name, system in systems.items() if system and "<analysis>" in system}
    assert think == {"mathvision", "dynamath", "wemath", "logicvista", "ai2d"}
    assert analysis == {"chartqa", "docvqa", "infovqa"}
    assert all("<answer>...</answer>" in systems[name] for name in think | analysis)
    assert all(get_benchmark(name).presets["quick"].system is None for name in NAMES)


def test_mathvision_puts_the_picture_where_its_marker_is_and_letters_the_options():
    first, second, *_ = prompts_of("mathvision", "quick")
    before, picture, after = user_text(first).split("|")
    assert before == (
        'Please solve the problem step by step and put your answer in one "\\boxed{}".The picture shows some dots.'
    )
    assert picture == "<IMAGE>"
    assert after == (
        "How many are there?\nChoices: A. 4\nB. 5\nC. 6\nD. 7\n"
        "Answer the question with the option's letter from the given choices directly."
    )
    assert options_of(first) == {"A": "4", "B": "5", "C": "6", "D": "7"}
    assert "Choices" not in user_text(second) and "letter" not in user_text(second)
    assert not any("<image1>" in user_text(prompt) for prompt in prompts_of("mathvision"))


def test_mathvision_refuses_an_answer_that_is_no_option():
    row = {**rows_of("mathvision")[0], "answer": "E"}
    with pytest.raises(DataError, match=r"answer 'E' is none of the options' letters A, B, C, D"):
        prompts_of("mathvision", rows=[row])


def test_ai2d_turns_the_index_into_a_letter():
    rows = rows_of("ai2d")
    assert [row["answer"] for row in rows] == ["2", "0", "1"]
    assert [prompt.answer for prompt in prompts_of("ai2d", rows=rows)] == ["C", "A", "B"]
    assert user_text(prompts_of("ai2d", rows=rows)[2]).endswith("A. sun\nB. leaf\nC. root")
    for answer in ("3", "-1", "B", "1.0"):
        with pytest.raises(DataError, match="not the index of one of 3 options"):
            prompts_of("ai2d", rows=[{**rows[2], "answer": answer}])


def test_ids_of_rows_without_one_do_not_depend_on_what_else_is_loaded():
    rows = rows_of("chartqa")
    ids = [prompt.id for prompt in prompts_of("chartqa", rows=rows)]
    assert [prompt.id for prompt in prompts_of("chartqa", rows=rows[2:])] == ids[2:]
    moved = {**rows[0], "image": {**rows[0]["image"], "path": "elsewhere.png"}}
    assert prompts_of("chartqa", rows=[moved])[0].id == ids[0]
    assert prompts_of("chartqa", rows=[{**rows[0], "question": "Which bar is small?"}])[0].id != ids[0]


@pytest.mark.parametrize("name", ["docvqa", "infovqa"])
def test_the_test_split_without_answers_says_where_they_are(name, tmp_path):
    maker = fixture_maker()
    rows = [{**row, "answers": None, "data_split": "test"} for row in rows_of(name)]
    path = tmp_path / name / maker.FILES[name].replace("validation", "test")
    maker.write_parquet(path, name, rows)
    found = load_rows(get_benchmark(name), tmp_path, split="test")
    with pytest.raises(DataError, match="test split are not public: score the validation split"):
        prompts_of(name, rows=found)


def test_document_answers_are_all_accepted_and_scored_by_similarity(pool):
    prompt = prompts_of("docvqa", "quick", "upstream")[2]
    assert prompt.answer == ["pears"] and prompts_of("docvqa")[0].answer == ["Jane Doe", "J. Doe"]
    near = pool.check([(prompt, "pear")])[0]
    assert near.score == pytest.approx(0.8)
    tagged = prompts_of("docvqa", "paper", "upstream")[2]
    first = pool.check([(tagged, "<analysis>x</analysis><answer>pear</answer>")])[0]
    assert first.score == pytest.approx(0.8)


def test_chartqa_follows_the_metric_of_the_task_whose_prompt_was_used(pool):
    answers = {("quick", "upstream"): "1.1", ("quick", "strict"): "1.1", ("paper", "strict"): "1.1"}
    row = {**rows_of("chartqa")[1], "answer": "1.08"}
    for (preset, profile), answer in answers.items():
        text = f"<answer>{answer}</answer>" if preset == "paper" else answer
        assert pool.check([(prompts_of("chartqa", preset, profile, [row])[0], text)])[0].correct
    recipe = prompts_of("chartqa", "paper", "upstream", [row])[0]
    assert pool.check([(recipe, "<answer>1.1</answer>")])[0].correct is False  # knows no 5 %


def test_chartqa_years_are_wrong_within_5_percent_only_where_upstream_says_otherwise(pool):
    strict, upstream = (prompts_of("chartqa", "quick", profile)[2] for profile in ("strict", "upstream"))
    assert [outcome.correct for outcome in pool.check([(strict, "1999"), (upstream, "1999")])] == [
        False,
        True,
    ]


def test_visulogic_takes_pictures_out_of_the_zip_file_or_out_of_the_row():
    rows = rows_of("visulogic")
    assert rows[0]["image_path"]["path"] == "images/00000.png"
    moved = [
        {k: v for k, v in row.items() if k != "image_path"} | {"image": row["image_path"]} for row in rows
    ]
    assert prompts_of("visulogic", rows=moved) == prompts_of("visulogic", rows=rows)


def test_visulogic_without_its_zip_file_is_a_data_error(tmp_path):
    folder = tmp_path / "visulogic"
    folder.mkdir()
    (folder / "data.jsonl").write_bytes((FIXTURES / "visulogic" / "data.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"images\.zip"):
        rows_of("visulogic", tmp_path)


def test_dynamath_reads_the_authors_files_of_one_split_per_variant(tmp_path):
    maker = fixture_maker()
    rows = [{k: v for k, v in row.items() if k != "question_id"} for row in maker.dynamath()]
    for variant, some in ((1, [rows[0], rows[2]]), (2, [rows[1], rows[3]])):
        maker.write_parquet(
            tmp_path / "dynamath" / f"data/sample_variant{variant}-00000-of-00001.parquet", "dynamath", some
        )
    found = rows_of("dynamath", tmp_path)
    assert sorted(row["id"] for row in found) == ["1", "1", "2", "2"]
    assert len({prompt.id for prompt in prompts_of("dynamath", rows=found)}) == 4


def test_dynamath_asks_for_the_kind_of_answer_that_a_row_has():
    float_, _, choice, _, text = prompts_of("dynamath", "quick")
    assert "three digits" in user_text(float_) and "letter" in user_text(choice)
    assert "'short answer'" in user_text(text)
    assert user_text(prompts_of("dynamath", "paper")[0]).split("|")[1] == rows_of("dynamath")[0]["question"]


def test_dynamath_averages_over_questions_and_takes_the_worst_variant():
    aggregate = get_benchmark("dynamath").aggregate
    rows = [{"id": "q1"}] * 10 + [{"id": "q2"}] * 10
    scores = [[1.0]] * 10 + [[1.0]] * 9 + [[None]]
    assert aggregate(rows, scores) == pytest.approx({"score": 0.95, "worst_case": 0.5})
    # q1 has one variant of two right, q2 its only one: 3/4 over questions (2/3 over rows), no worst case.
    assert aggregate([{"id": "q1"}, {"id": "q1"}, {"id": "q2"}], [[1.0], [0.0], [1.0]]) == {"score": 0.75}
    assert aggregate([], []) == {}


def wemath_rows(problems):
    """Rows and one score each, of (right steps, right whole) per problem."""
    rows, scores = [], []
    for number, (steps, whole) in enumerate(problems):
        kind = f"{len(steps)}steps"
        keys = [*(f"{kind}_{i}" for i in range(1, len(steps) + 1)), f"{kind}_multi"]
        rows += [{"ID": f"p{number}", "key": key} for key in keys]
        scores += [[float(right)] for right in (*steps, whole)]
    return rows, scores


def test_wemath_counts_the_four_kinds_of_problems():
    # mastered; steps right but not the whole (half); a step wrong and the whole too (0); the whole right with one step
    # wrong (strict 0, loose 1); the whole right with all steps wrong (0).
    kinds = [([1, 1], 1), ([1, 1, 1], 0), ([1, 0], 0), ([0, 1], 1), ([0, 0, 0], 1)]
    numbers = get_benchmark("wemath").aggregate(*wemath_rows(kinds))
    assert numbers["score"] == pytest.approx((1 + 0.5 + 0 + 0 + 0) / 5)
    assert numbers["score_loose"] == pytest.approx((1 + 0.5 + 0 + 1 + 0) / 5)
    assert numbers["rote_memorization"] == pytest.approx(2 / 3)
    assert numbers["accuracy"] == pytest.approx((3 + 3 + 1 + 2 + 1) / 17)
    nothing = get_benchmark("wemath").aggregate(*wemath_rows([([0, 0], 0)]))
    assert nothing["score"] == 0 and nothing["rote_memorization"] == 0


def test_wemath_gives_its_published_numbers_on_all_525_problems():
    kinds = (
        [([1, 1], 1)] * 120 + [([1, 1], 0)] * 80 + [([1, 0], 1)] * 60 + [([1, 0], 0)] * 60
        + [([0, 0], 1)] * 20 + [([0, 0], 0)] * 20 + [([1, 1, 1], 1)] * 60 + [([1, 1, 1], 0)] * 25
        + [([0, 0, 0], 1)] * 10 + [([1, 1, 0], 1)] * 40 + [([1, 1, 0], 0)] * 30
    )  # fmt: skip
    rows, scores = wemath_rows(kinds)
    assert len(kinds) == 525 and len(rows) == get_benchmark("wemath").n_rows
    numbers = get_benchmark("wemath").aggregate(rows, scores)
    # 180 mastered, 105 inadequate generalizations, 100 more mastered when one right step is enough.
    assert numbers["score"] == pytest.approx((180 + 0.5 * 105) / 525) == pytest.approx(0.442857, abs=1e-6)
    assert numbers["score_loose"] == pytest.approx((280 + 0.5 * 105) / 525)


def test_wemath_cut_off_by_a_limit_has_item_accuracy_only_and_says_so():
    rows, scores = wemath_rows([([1, 1], 1), ([1, 0], 1)])
    with pytest.warns(UserWarning, match="no strict or loose score"):
        assert get_benchmark("wemath").aggregate(rows[:5], scores[:5]) == {"accuracy": pytest.approx(0.8)}


def test_wemath_averages_over_samples():
    rows, scores = wemath_rows([([1, 1], 1)])
    numbers = get_benchmark("wemath").aggregate(rows, [[*samples, None] for samples in scores])
    assert numbers["score"] == 0.5 and numbers["accuracy"] == 0.5


def test_chartqa_reports_both_halves():
    aggregate = get_benchmark("chartqa").aggregate
    rows = [{"type": "human_test"}] * 2 + [{"type": "augmented_test"}] * 2
    numbers = aggregate(rows, [[1.0], [0.0], [1.0], [1.0]])
    assert numbers == {"score": 0.75, "human": 0.5, "augmented": 1.0}
    assert aggregate(rows[:2], [[1.0], [None]]) == {"score": 0.5, "human": 0.5}


@pytest.mark.parametrize(
    ("name", "column", "key"),
    [("logicvista", "skill", "skill/inductive"), ("visulogic", "tag", "tag/spatial_reasoning")],
)
def test_logic_benchmarks_report_each_kind_of_question(name, column, key):
    rows = rows_of(name)
    scores = [[float(i == 0)] for i in range(len(rows))]
    numbers = get_benchmark(name).aggregate(rows, scores)
    assert numbers["score"] == pytest.approx(1 / len(rows))
    values = {f"{column}/" + "_".join(row[column].lower().split()) for row in rows}
    assert key in values and set(numbers) == {"score"} | values
    assert sum(value == 0 for value in numbers.values()) == len(values) - 1


def test_reference_numbers_name_known_tasks_and_their_table():
    reference = yaml.safe_load((ROOT / "eval" / "reference.yaml").read_text(encoding="utf-8"))
    assert "2605.03677" in reference["paper"]
    known = {*benchmark_names(), *GROUPS}
    keys = set()
    for number in reference["numbers"]:
        assert number["task"] in known and number["table"]
        assert 0 < number["score"] < 100
        settings = {k: v for k, v in number.items() if k not in ("score", "from")}
        keys.add(json.dumps(settings, sort_keys=True))
    assert len(keys) == len(reference["numbers"])
