"""From outcomes to numbers, tables, comparisons and pages."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import GREEDY, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tasks import get_benchmark

from uniopd_mm.errors import ConfigError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, mean_score
from uniopd_mm.evaluation.comparing import compare_runs
from uniopd_mm.evaluation.folder import read_scores, write_results, write_task
from uniopd_mm.evaluation.page import choose, write_page
from uniopd_mm.evaluation.progress import ProgressLine
from uniopd_mm.evaluation.references import reference_text
from uniopd_mm.evaluation.results import Scored, means, repeated, summarise_benchmark, units
from uniopd_mm.evaluation.samples import Sample
from uniopd_mm.evaluation.statistics import bootstrap_interval, compare, mcnemar, sign_flip
from uniopd_mm.evaluation.tables import comparison_table, result_table
from uniopd_mm.evaluation.tasks import Task, changed_preset, mean_by_domain, own_benchmark
from uniopd_mm.rollout import Outcome

RIGHT, WRONG = Outcome(True, 1.0, "7"), Outcome(False, 0.0, "8")
UNPARSED, UNKNOWN = Outcome(False, 0.0, None, "no answer found"), Outcome(None, reason="judge is down")


def benchmark(**changes: Any) -> Benchmark:
    standard: dict[str, Any] = {
        "name": "bench",
        "title": "Bench",
        "domain": "text_math",
        "sources": (),
        "columns": ("question",),
        "presets": {},
        "read": lambda row, preset, profile: prompt(row["question"]),
    }
    return Benchmark(**standard | changes)


def scored(outcomes: Mapping[str, list[Outcome]], **more: Any) -> list[Scored]:
    return [
        Scored(Sample("bench", id, i, more.get("text", "text"), more.get("finish", "stop"), 10), outcome)
        for id, some in outcomes.items()
        for i, outcome in enumerate(some)
    ]


def summary(
    outcomes: Mapping[str, list[Outcome]], made: Benchmark | None = None, **more: Any
) -> dict[str, Any]:
    rows = [{"question": id} for id in outcomes]
    return summarise_benchmark(
        made or benchmark(), rows, [prompt(id) for id in outcomes], scored(outcomes, **more)
    )


def task(ids: list[str], **more: Any) -> Task:
    return Task(
        benchmark(), Preset(GREEDY), [{"question": id} for id in ids], [prompt(id, **more) for id in ids]
    )


def write_run(
    out: Path,
    outcomes: Mapping[str, list[Outcome]],
    profile: str = "strict",
    model: str = "one",
    verifier: str = "math",
    digest: str = "",
    answer: str = "7",
) -> Path:
    made = {"sampled": {"model": {"path": model}, "sampling": {"top_k": 0}}, "run": {"profile": profile}}
    of = replace(task(list(outcomes), answer=answer), digests=dict.fromkeys(outcomes, digest))
    write_task(out / "bench", of, made, scored(outcomes), [verifier] * len(outcomes))
    return out


def test_shares_of_what_to_distrust_a_number_by_are_counted_apart() -> None:
    found = summary({"a": [RIGHT], "b": [WRONG], "c": [UNPARSED], "d": [UNKNOWN]}, finish="length")
    assert (found["score"], found["unknown"], found["unparsed"], found["truncated"]) == (
        0.25,
        0.25,
        0.25,
        1.0,
    )
    assert found["tokens"] == 10 and found["unknown_reasons"] == {"judge is down": 1}
    low, high = found["interval"]
    assert 0 <= low <= 0.25 <= high <= 1


def test_a_graded_metric_keeps_its_value() -> None:
    half = Outcome(True, 0.5, "pear")
    assert summary({"a": [half], "b": [WRONG]})["score"] == 0.25


def test_several_samples_give_avg_pass_maj_and_vote() -> None:
    found = summary({"a": [RIGHT, WRONG, WRONG, RIGHT], "b": [RIGHT, RIGHT, RIGHT, UNKNOWN]})
    more = found["more"]
    assert more["avg@4"] == found["score"] == 5 / 8
    assert more["pass@2"] == pytest.approx((1 - 1 / 6 + 1) / 2)
    assert more["pass@4"] == 1 and more["maj@4"] == 0.5 and more["vote@4"] == 1.0
    assert "pass@2" not in summary({"a": [RIGHT]})["more"]
    assert repeated([scored({"a": [RIGHT]}), scored({"b": [RIGHT, RIGHT]})]) == {}


def test_rows_of_one_problem_are_drawn_together() -> None:
    """Ten variants of each of two problems are two pieces of evidence, not twenty."""
    rows = [{"id": str(i // 10), "question": f"q{i}"} for i in range(20)]
    made = benchmark(columns=("id", "question"))
    assert units(made, rows) == [row["id"] for row in rows]
    outcomes = {f"q{i}": [RIGHT if i < 10 else WRONG] for i in range(20)}
    grouped = summarise_benchmark(made, rows, [prompt(id) for id in outcomes], scored(outcomes))
    assert grouped["interval"] == (0.0, 1.0)
    low, high = summary(outcomes)["interval"]
    assert 0.2 < low < high < 0.8


@pytest.mark.parametrize(("outcome", "low", "high"), [(WRONG, 0.0, 0.3085), (RIGHT, 0.6915, 1.0)])
def test_ten_equal_outcomes_do_not_make_a_number_certain(outcome: Any, low: float, high: float) -> None:
    assert summary({str(i): [outcome] for i in range(10)})["interval"] == pytest.approx((low, high), abs=1e-4)


def test_a_number_that_is_no_mean_over_units_has_no_interval() -> None:
    made = benchmark(
        aggregate=lambda rows, scores: {"score": mean_score(rows, scores)["score"] ** 2 / len(rows)}
    )
    assert summary({"a": [RIGHT], "b": [RIGHT], "c": [WRONG]}, made)["interval"] is None


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
@settings(max_examples=40, deadline=None)
def test_an_interval_holds_its_mean(values: list[float]) -> None:
    low, high = bootstrap_interval(values)
    mean = sum(values) / len(values)
    assert min(values) - 1e-9 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= max(values) + 1e-9


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        low, high = bootstrap_interval(random.random(60) < 0.6)
        held += low <= 0.6 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    assert mcnemar(10, 0) == pytest.approx(2 / 2**10)
    assert mcnemar(8, 2) == pytest.approx(2 * sum(math.comb(10, k) for k in range(3)) / 2**10)


def test_sign_flips_agree_with_mcnemar_where_both_apply() -> None:
    gain = [1.0] * 14 + [-1.0] * 5 + [0.0] * 30
    assert sign_flip(gain) == pytest.approx(mcnemar(14, 5), abs=0.02)
    assert sign_flip([0.0, 0.0]) == 1.0


def test_a_comparison_is_of_pairs() -> None:
    first, second = [0.0, 1.0, 0.0, 1.0] * 10, [1.0, 1.0, 0.0, 1.0] * 10
    found = compare(first, second)
    assert (found.mean, found.won, found.lost, found.n) == (0.25, 10, 0, 40)
    assert found.test == "McNemar" and found.p < 0.01 and 0 < found.low < 0.25 < found.high
    assert compare(second, first).mean == -0.25
    assert compare([0.5, 0.2], [0.6, 0.2]).test == "sign flips"


def test_runs_are_compared_on_the_rows_that_both_have(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {"a": [WRONG], "b": [RIGHT], "c": [WRONG]})
    two = write_run(tmp_path / "two", {"b": [RIGHT], "c": [RIGHT], "d": [RIGHT]}, model="two")
    found = compare_runs(one, two)["bench"]
    assert (found.difference.n, found.difference.mean, found.only_first, found.only_second) == (2, 0.5, 1, 1)
    text = comparison_table({"bench": found.difference}, {"bench": (found.first, found.second)})
    assert "+50.0" in text and "McNemar" in text


def test_runs_made_in_different_ways_are_compared_only_by_force(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {"a": [WRONG], "b": [RIGHT]})
    two = write_run(tmp_path / "two", {"a": [RIGHT], "b": [RIGHT]}, profile="upstream")
    with pytest.raises(ConfigError, match=r'run.profile: "strict" -> "upstream"(.|\n)*--force'):
        compare_runs(one, two)
    assert compare_runs(one, two, force=True)["bench"].difference.mean == 0.5
    with pytest.raises(ConfigError, match="no evaluation"):
        compare_runs(one, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verifier": "exact"}, "verifier: exact -> math"),
        ({"digest": "0123"}, "another question or picture in 2 of 2 rows"),
        ({"answer": "8"}, "another gold answer in 2 of 2 rows"),
    ],
)
def test_rows_that_are_not_the_same_are_compared_only_by_force(
    change: dict[str, str], message: str, tmp_path: Path
) -> None:
    outcomes = {"a": [WRONG], "b": [RIGHT]}
    one, two = write_run(tmp_path / "one", outcomes, **change), write_run(tmp_path / "two", outcomes)
    with pytest.raises(ConfigError, match=message):
        compare_runs(one, two)
    assert compare_runs(one, two, force=True)["bench"].difference.n == 2


def test_a_comparison_counts_unknown_answers_which_look_like_wrong_ones(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {"a": [UNKNOWN, UNKNOWN], "b": [RIGHT], "only here": [UNKNOWN]})
    two = write_run(tmp_path / "two", {"a": [RIGHT], "b": [UNKNOWN]})
    found = compare_runs(one, two)["bench"]
    assert (found.unknown_first, found.unknown_second, found.difference.mean) == (2, 1, 0.0)


def test_rows_without_an_answer_are_said_to_be_in_no_number() -> None:
    rows = [{"question": id} for id in "abc"]
    found = summarise_benchmark(benchmark(), rows, [prompt(id) for id in "abc"], scored({"a": [RIGHT]}))
    assert found["score"] == 1.0 and found["notes"] == ["2 of 3 rows have no answer and are in no number"]


def test_results_are_json_for_every_reader_whatever_a_reason_holds(tmp_path: Path) -> None:
    strange = Outcome(None, reason="half \ud83d pair \u2028")
    write_results(tmp_path, {"out": "caf\udce9"}, {"bench": summary({"a": [strange]})}, {})
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert json.loads(text)["results"]["bench"]["unknown_reasons"] == {strange.reason: 1}


def test_own_rows_are_in_no_mean_with_the_quickstart() -> None:
    own, quick = own_benchmark("mine"), get_benchmark("quickstart")
    found = [{"domain": one.domain, "score": 0.5} for one in (own, quick)]
    assert means(dict(zip("ab", found, strict=True))) == {"all benchmarks": 0.5}


def test_a_table_shows_every_number_and_the_mean_of_a_domain() -> None:
    results = {
        "aime24": summary({"a": [RIGHT, WRONG]}, benchmark(title="AIME 2024", metric="avg@k")),
        "aime25": summary({"a": [WRONG, WRONG]}, benchmark(title="AIME 2025")),
    }
    averages = means(results)
    assert averages == {"text_math": 0.25, "all benchmarks": 0.25}
    text = result_table(results, averages)
    for part in ("AIME 2024", "avg@2", "1 x 2", "50.0", "pass@2", "mean of text math", "25.0"):
        assert part in text, part


def test_published_numbers_stand_beside_a_result(tmp_path: Path) -> None:
    path = tmp_path / "reference.yaml"
    path.write_text(
        "paper: The Paper\nnumbers:\n"
        "- {task: chartqa, model: Model-4B, method: student, score: 81.5}\n"
        "- {task: chartqa, model: Model-4B, method: Uni-OPD, setting: multi-teacher, score: 84.25}\n"
        "- {task: image_math, model: Model-4B, method: student, score: 50.0}\n"
    )
    results = {"chartqa": {"score": 0.8}}
    text = reference_text(path, "org/model-4b", results, {})
    assert "80.0" in text and "81.5" in text and "84.2" in text and "Uni-OPD, multi-teacher" in text
    assert "image_math" not in text  # its benchmarks were not all run
    assert "--reference" in reference_text(path, "runs/mine/model", results, {})
    assert reference_text(path, "model-4b", {"docvqa": {"score": 0.5}}, {}) == ""


def test_the_reference_numbers_name_benchmarks_and_groups_that_exist() -> None:
    from tasks import GROUPS, benchmark_names

    root = Path(__file__).resolve().parents[2]
    known = {name: {"score": 0.5} for name in [*benchmark_names(), *GROUPS]}
    assert "Qwen3-4B" in reference_text(root / "eval" / "reference.yaml", "Qwen3-4B", known, {})


def test_a_page_shows_answers_as_text_and_failures_first(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (900, 300), "red").save(stream, "PNG")
    outcomes = {"right": [RIGHT], "wrong": [WRONG], "lost": [UNKNOWN], "mute": [UNPARSED]}
    evil = "</script><script>alert(1)</script><!-- \u2028"
    made = task(list(outcomes), images=(stream.getvalue(),))
    some = scored(outcomes, text=evil)
    result = summarise_benchmark(made.benchmark, made.rows, made.prompts, some)
    write_page(tmp_path / "samples.html", made, result, some, ["model m"])
    text = (tmp_path / "samples.html").read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "{{data}}" not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [s["id"] for s in data["samples"]] == ["wrong", "mute", "lost", "right"]
    assert all(s["response"] == evil for s in data["samples"])
    assert data["samples"][0]["pictures"][0].startswith("data:image/jpeg;base64,")
    assert data["counts"] == {"correct": 1, "wrong": 1, "unknown": 1, "unparsed": 1}
    assert "http://" not in text and "https://" not in text


def test_a_page_holds_at_most_so_many_samples_of_every_kind() -> None:
    some = scored({f"w{i}": [WRONG, WRONG] for i in range(300)} | {f"r{i}": [RIGHT] for i in range(9)})
    shown = choose(some, most=40)
    assert len(shown) == 40
    assert [one.state for one in shown] == ["wrong"] * 31 + ["correct"] * 9
    assert len({one.sample.id for one in shown}) == 40  # no prompt twice while there are others


def test_scores_on_disk_say_what_was_judged_by_what(tmp_path: Path) -> None:
    write_run(tmp_path, {"a": [WRONG, RIGHT]})
    (_, lines), *_ = read_scores(tmp_path).items()
    assert [(line["id"], line["index"], line["score"], line["verifier"]) for line in lines] == [
        ("a", 0, 0.0, "math"),
        ("a", 1, 1.0, "math"),
    ]
    write_results(tmp_path, {"model": "m"}, {"bench": summary({"a": [RIGHT]})}, {})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["results"]["bench"]["score"] == 1.0 and found["versions"]["uniopd_mm"]


def test_domains_of_own_rows_are_shown_where_there_are_several() -> None:
    rows = [{"domain": "read"}, {"domain": "read"}, {"domain": "count"}]
    assert mean_by_domain(rows, [[1.0], [0.0], [None]]) == {
        "score": pytest.approx(1 / 3),
        "read": 0.5,
        "count": 0.0,
    }
    assert mean_by_domain(rows[:2], [[1.0], [0.0]]) == {"score": 0.5}


def test_a_preset_is_changed_only_where_asked() -> None:
    preset = get_benchmark("aime25").presets["paper"]
    changed = changed_preset(preset, {"n": 4, "limit": None, "temperature": 0.6, "top_p": None})
    assert (changed.n, changed.limit, changed.sampling.temperature) == (4, None, 0.6)
    assert changed.sampling.max_new_tokens == preset.sampling.max_new_tokens
    assert changed.prompt == preset.prompt


def test_progress_is_plain_lines_with_the_time_left_without_a_terminal() -> None:
    file, now = io.StringIO(), [0.0]
    with ProgressLine("chartqa", file=file, clock=lambda: now[0]) as progress:
        for done in range(11):
            progress(done, 10)
            now[0] += 4
    assert file.getvalue().splitlines() == [  # after 5 s, then every 30 s, and the end
        "chartqa: 2/10 answers  eta 32 s",
        "chartqa: 10/10 answers  eta 0 s",
    ]
    now[0] = 0.0
    with ProgressLine("slow", file=file, clock=lambda: now[0]) as progress:
        for done in range(6):
            progress(done, 100)
            now[0] += 20
    assert [line.split()[1] for line in file.getvalue().splitlines()[2:]] == ["1/100", "3/100", "5/100"]
    silent = io.StringIO()
    with ProgressLine("chartqa", shown=False, file=silent) as progress:
        progress(10, 10)
    assert not silent.getvalue()


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with ProgressLine("chartqa", file=file) as progress:
        progress(0, 10)
        progress(3, 10)
    assert "chartqa" in file.getvalue() and "3/10 answers" in file.getvalue()


def test_problems_of_unequal_size_have_an_interval_too() -> None:
    rows = [{"ID": str(i // 4 if i < 8 else 2 + (i - 8) // 3), "question": f"q{i}"} for i in range(20)]
    made = benchmark(columns=("ID", "question"))
    outcomes = {f"q{i}": [RIGHT if i % 3 else WRONG] for i in range(20)}
    found = summarise_benchmark(made, rows, [prompt(id) for id in outcomes], scored(outcomes))
    low, high = found["interval"]
    assert low <= found["score"] <= high


def test_what_an_aggregate_warns_of_is_a_note() -> None:
    def aggregate(rows: Any, scores: Any) -> dict[str, float]:
        warnings.warn("too few rows", stacklevel=2)
        return mean_score(rows, scores)

    assert summary({"a": [RIGHT], "b": [WRONG]}, benchmark(aggregate=aggregate))["notes"] == ["too few rows"]
