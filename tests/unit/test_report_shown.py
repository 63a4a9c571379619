"""What people see of a run: console, curves, trackers."""

from __future__ import annotations

import io
import re
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uniopd_mm.report import Change, Console, RunFolder, Trackers, find_metric, plot_curves, summarize
from uniopd_mm.report.console import format_duration, pack
from uniopd_mm.report.curves import binned, phase_seconds, running_mean

METRICS_OF_A_STEP = {
    "train/gap": -0.1842,
    "train/accuracy": 0.547,
    "train/inverted_share": 0.125,
    "train/entropy": 0.61,
    "train/unknown_share": 0.0,
    "rollout/length": 412.3,
    "rollout/truncated_share": 0.016,
    "perf/tokens_per_s": 2310.4,
    "time/sample_s": 9.1,
    "time/verify_s": 0.2,
    "time/score_s": 4.0,
    "time/update_s": 6.2,
}


# --- the console ----------------------------------------------------------------------------------


def test_all_metrics_shown_here_are_documented():
    assert all(find_metric(name) for name in METRICS_OF_A_STEP)


class Clock:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def full_run(console: Console, clock: Clock) -> None:
    console.header(
        student="Qwen/Qwen3-VL-2B-Instruct",
        teachers={"math": "Qwen/Qwen3-VL-8B-Instruct", "code": "Qwen/Qwen2.5-Coder-7B-Instruct"},
        device="8 x H100",
        run="runs/chartqa-2b",
    )
    console.check("vocabulary", "151936 = 151936", True)
    console.check("null test", "the worst token of chartqa/812 is off by 0.31 nats; " * 3, False)
    console.evaluation(0, {"eval/accuracy": 0.41, **{f"eval/domain_{i}/accuracy": 0.5 for i in range(9)}})
    for step in (1, 2, 3):
        with console.phase("sample"):
            clock.now += 60.0
        console.step(step, {**METRICS_OF_A_STEP, **console.take_times()})
    console.table(
        [Change("held-out accuracy", "eval/accuracy", 0.412, 0.539), Change("x" * 99, "train/gap", None, -1)]
    )


def plain_run(rank=0, **settings) -> str:
    file, clock = io.StringIO(), Clock()
    with Console(rank, 3, file=file, clock=clock, **settings) as console:
        full_run(console, clock)
    return file.getvalue()


def test_plain_output_has_no_escape_codes_and_fits_80_columns():
    text = plain_run()
    assert "\x1b" not in text and "\r" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_step_is_summarised_as_people_read_it():
    file, clock = io.StringIO(), Clock()
    console = Console(0, 400, 120, file=file, clock=clock, history=[{"step": 1, "train/gap": -0.412}])
    with console.phase("sample"):
        clock.now += 24.0
    console.step(121, METRICS_OF_A_STEP)
    assert file.getvalue().splitlines() == [
        "step 121/400  30 %  eta 1 h 51 min  sample 9.1 verify 0.2 score 4.0 update 6.2 s",
        "  gap -0.184 nats/token (was -0.412 at step 1)  accuracy 54.7 %  inverted 12.5 %",
        "  entropy 0.610  length 412  truncated 1.6 %  2310 tokens/s",
    ]


def test_missing_metrics_are_left_out_and_nan_is_shown():
    file = io.StringIO()
    Console(0, 2, file=file).step(
        1, {"train/gap": float("nan"), "train/accuracy": None, "rollout/length": 3.0}
    )
    assert file.getvalue().splitlines()[1] == "  gap nan nats/token  length 3"


def test_unknown_outcomes_are_shown_when_there_are_some():
    file = io.StringIO()
    Console(0, 2, file=file).step(1, {"train/unknown_share": 0.25})
    assert "unknown 25.0 %" in file.getvalue()


def test_only_rank_0_speaks_but_every_rank_measures():
    file, clock = Terminal(), Clock()
    console = Console(1, 3, file=file, clock=clock)
    with console.phase("sample"):
        clock.now += 2.0
    full_run(console, clock)
    assert file.getvalue() == ""
    with console.phase("score"):
        clock.now += 3.0
    assert console.take_times() == {"time/score_s": 3.0}


def test_times_are_given_once_and_an_inner_phase_is_not_counted_twice():
    clock = Clock()
    console = Console(1, 3, clock=clock)
    with console.phase("update"):
        clock.now += 1.0
        with console.phase("score"):
            clock.now += 5.0
        clock.now += 2.0
    clock.now += 50.0
    with pytest.raises(KeyError), console.phase("save"):
        clock.now += 4.0
        raise KeyError
    assert console.take_times() == {"time/update_s": 3.0, "time/score_s": 5.0, "time/save_s": 4.0}
    assert console.take_times() == {}


def test_quick_steps_are_not_all_printed_but_the_first_and_the_last_are():
    file, clock = io.StringIO(), Clock()
    console = Console(0, 10, file=file, clock=clock, interval_s=5.0)
    for step in range(1, 11):
        clock.now += 2.0
        console.step(step, {})
    assert [int(line.split()[1].split("/")[0]) for line in file.getvalue().splitlines()] == [1, 4, 7, 10]


def test_the_time_left_does_not_count_the_evaluation_before_training():
    clock = Clock()
    console = Console(0, 11, file=io.StringIO(), clock=clock)
    with console.phase("eval"):
        clock.now += 1000.0
    console.evaluation(0, {"eval/accuracy": 0.1})
    assert console.eta_s(0) is None
    with console.phase("sample"):
        clock.now += 7.0
    console.step(1, {})
    assert console.eta_s(1) == 70.0


def test_a_terminal_gets_one_bar_that_is_taken_off_again(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    file, clock = Terminal(), Clock()
    with Console(0, 3, file=file, clock=clock) as console:
        full_run(console, clock)
        assert console.phase_text() == ""
        with console.phase("save"):
            clock.now += 190.0
            assert console.phase_text() == "save 3 min 10 s"
    text = file.getvalue()
    assert text.count("\x1b[?25l") == 1 and text.count("\x1b[?25h") == 1  # cursor hidden once, shown again
    assert text.rstrip().endswith("\x1b[2K")  # the bar's line is erased
    visible = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "step 3/3" in visible and "gap -0.184 nats/token" in visible
    assert max(len(line.rpartition("\r")[2].rstrip()) for line in visible.splitlines()) <= 80


def test_a_long_path_stays_whole_so_that_it_can_be_copied():
    file, path = io.StringIO(), "runs/" + "a-very-long-name/" * 6
    Console(0, 1, file=file).note(f"saved {path}")
    assert path in file.getvalue()


def test_brackets_in_names_are_text_and_not_markup(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    Console(0, 1, file=file).note("run [red]a[/red] and [/b]")
    assert "[red]a[/red] and [/b]" in file.getvalue()


@given(
    st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=40), max_size=12),
    st.integers(42, 90),
)
def test_packed_lines_lose_nothing_and_fit(parts, width):
    lines = pack(parts, width)
    assert " ".join(lines).split() == parts
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.6, "1 min"),
        (190, "3 min 10 s"),
        (6720, "1 h 52 min"),
        (183600, "2 d 3 h"),
        (-1, "0 s"),
    ],
)
def test_durations_read_naturally(seconds, text):
    assert format_duration(seconds) == text


def test_the_final_table_shows_before_and_after():
    events = [
        {"step": 0, "eval/accuracy": 0.412, "eval/chart/accuracy": 0.5},
        *({"step": s, "train/gap": -0.5 + 0.1 * (s > 10), "time/sample_s": 2.0} for s in range(1, 21)),
        {"step": 20, "eval/accuracy": 0.539, "eval/chart/accuracy": None},
    ]
    file = io.StringIO()
    Console(0, 20, file=file).table(summarize(events))
    assert [re.split(" {2,}", line) for line in file.getvalue().splitlines()] == [
        ["", "before", "after", "change"],
        ["held-out accuracy", "41.2 %", "53.9 %", "+12.7 points"],
        ["", "chart", "50.0 %", "-"],
        ["token gap, nats", "-0.500", "-0.400", "+0.100"],
        ["sample, per step", "2.0 s", "2.0 s", "+0.0 s"],
    ]


def test_nothing_logged_is_an_empty_summary():
    assert summarize([]) == []


# --- curves ---------------------------------------------------------------------------------------


def events_of(steps: int) -> list[dict]:
    rows = [{"step": 0, "eval/accuracy": 0.2, "eval/chart/accuracy": 0.2, "time/eval_s": 60.0}]
    rows += [{"step": step, **METRICS_OF_A_STEP} for step in range(1, steps + 1)]
    return [*rows, {"step": steps, "eval/accuracy": 0.4, "eval/chart/accuracy": None, "time/eval_s": 60.0}]


@pytest.mark.parametrize(
    "events", [[], [{"step": 1, "train/gap": -0.3}], [{"step": 0, "time/eval_s": 1.0}], events_of(60)]
)
def test_curves_are_drawn_from_none_one_and_many_points(tmp_path, events):
    pytest.importorskip("matplotlib")
    with RunFolder(tmp_path) as folder:
        for event in events:
            folder.append_metrics(event)
    path = plot_curves(folder.metrics, tmp_path / "pictures" / "curves.png")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1000


def test_curves_name_the_extra_when_matplotlib_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r'pip install "uniopd-mm\[train\]"'):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_seconds_of_one_step_add_up_over_its_events_in_the_order_of_a_step():
    events = [
        {"step": 1, "time/update_s": 2.0, "time/sample_s": 1.0},
        {"step": 1, "time/update_s": 3.0, "time/x_s": None},
    ]
    assert phase_seconds(events) == {"sample": {1: 1.0}, "update": {1: 5.0}}
    assert list(phase_seconds(events)) == ["sample", "update"]


def test_bins_hold_the_mean_of_the_steps_that_are_there():
    assert binned({1: 2.0, 2: 4.0, 5: 9.0}, 1, 6, 2) == [3.0, 0.0, 9.0]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 9))
def test_the_running_mean_stays_within_the_values(values, window):
    means = running_mean(values, window)
    assert len(means) == len(values)
    assert all(min(values) - 1e-9 <= mean <= max(values) + 1e-9 for mean in means)


# --- trackers -------------------------------------------------------------------------------------


class FakeService:
    """Stands for wandb and trackio: keeps the calls."""

    def __init__(self, fails_at=None):
        self.started, self.logged, self.finished, self.fails_at = [], [], 0, fails_at

    def init(self, **settings):
        self.started.append(settings)
        return self

    def define_metric(self, *_, **__): ...

    def log(self, metrics, step=None):
        if len(self.logged) == self.fails_at:
            raise ConnectionError("service is down")
        self.logged.append((metrics.get("step", step), {k: v for k, v in metrics.items() if k != "step"}))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_mirrors_the_numbers_and_goes_on_after_a_resume(tmp_path, monkeypatch, name):
    service = FakeService()
    monkeypatch.setitem(sys.modules, name, service)
    for start in (0, 1):
        with Trackers([name], tmp_path, {"steps": 2}, start_step=start) as trackers:
            trackers.log({"step": start + 1, "train/gap": -0.5, "train/loss": None, "train/lr": float("nan")})
    assert service.logged == [(1, {"train/gap": -0.5}), (2, {"train/gap": -0.5})]
    assert service.finished == 2
    first, second = service.started
    assert first == second and first["resume"] == "allow" and first["config"] == {"steps": 2}


def test_other_ranks_do_not_even_load_a_tracker(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Trackers(["wandb"], tmp_path, {}, rank=1) as trackers:
        trackers.log({"step": 1, "train/gap": -0.5})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        Trackers([name], tmp_path, {})


def test_a_tracker_that_breaks_is_dropped_with_a_warning_and_the_others_go_on(tmp_path, monkeypatch):
    broken, sound = FakeService(fails_at=1), FakeService()
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.setitem(sys.modules, "trackio", sound)
    trackers = Trackers(["wandb", "trackio"], tmp_path, {})
    trackers.log({"step": 1, "a": 1.0})
    with pytest.warns(UserWarning, match="wandb is off from step 2.*service is down"):
        trackers.log({"step": 2, "a": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.log({"step": 3, "a": 1.0})
    assert [step for step, _ in broken.logged] == [1]
    assert [step for step, _ in sound.logged] == [1, 2, 3]


def test_tensorboard_hides_the_steps_that_a_resumed_run_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, value in ((0, 1.0), (2, 2.0)):
        with Trackers(["tensorboard"], tmp_path, {}, start_step=start) as trackers:
            for step in range(start + 1, 5):
                trackers.log({"step": step, "train/gap": value})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/gap")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
    ]
