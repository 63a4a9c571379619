"""Settings: strict, documented, all problems at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from uniopd_mm.config import TrainConfig
from uniopd_mm.errors import ConfigError
from uniopd_mm.settings import config_diff, describe, dump_config, load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
out: runs/x
steps: 10
student: {model: a}
teachers:
  math: {model: b}
data: {train: rows.jsonl}
"""


def load(tmp_path: Path, text: str = RECIPE, *overrides: str) -> TrainConfig:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(TrainConfig, path, overrides)


def problems(tmp_path: Path, text: str = RECIPE, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_overrides_replace_and_add_settings(tmp_path: Path) -> None:
    config = load(
        tmp_path, RECIPE, "optim.lr=1e-4", "teachers.math.view=text", "student.freeze=[vision, projector]"
    )
    assert config.optim.lr == 1e-4
    assert config.teachers["math"].view == "text" and config.teachers["math"].model == "b"
    assert config.student.freeze == ["vision", "projector"]


def test_setting_part_of_a_block_keeps_the_other_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, RECIPE, "eval.sampling.max_new_tokens=7").eval.sampling.temperature == 0


def test_all_problems_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    text = (
        RECIPE.replace("steps: 10", "steps: zero").replace("model: a", "modle: a")
        + "optim:\n  lr: 1\n  lr: 2\n"
    )
    message = problems(tmp_path, text, "balance.ratio=-1", "nonsense")
    for part in (
        "6 problems",
        "recipe.yaml:2: steps: Input should be a valid integer",
        "recipe.yaml:3: Unknown setting 'student.modle'. Did you mean 'student.model'?",
        "recipe.yaml:3: student.model: Field required",
        "recipe.yaml:9: 'optim.lr' is set twice (first at",
        "command line: balance.ratio: Input should be greater than or equal to 0",
        "'nonsense' is not of the form key=value",
    ):
        assert part in message, (part, message)


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("optim.warmup_step=3", "optim.warmup_steps"),
        ("lr=3", "optim.lr"),
        ("teachers.math.veiw=text", "teachers.math.view"),
        ("data.train=[{path: x, weigth: 2}]", "data.train.0.weight"),
        ("calibratoin.kind=shift", "calibration"),
    ],
)
def test_an_unknown_setting_comes_with_a_suggestion(tmp_path: Path, override: str, suggestion: str) -> None:
    assert f"Did you mean '{suggestion}'?" in problems(tmp_path, RECIPE, override)


def test_a_view_may_be_given_for_each_domain(tmp_path: Path) -> None:
    teacher = load(tmp_path, RECIPE, "teachers.math.view={chart: image}").teachers["math"]
    assert teacher.view_of("chart") == "image" and teacher.view_of("math") is None
    wrong = problems(tmp_path, RECIPE, "teachers.math.view={chart: picture}")
    assert wrong.startswith("1 problem") and "teachers.math.view.chart" in wrong


def test_a_sampling_server_that_takes_no_weights_must_be_asked_for_none(tmp_path: Path) -> None:
    server = "rollout.server={kind: openai, urls: [http://localhost:8000]"
    assert "set sync: never" in problems(tmp_path, RECIPE, server + "}")
    assert load(tmp_path, RECIPE, server + ", sync: never}").rollout.server is not None


def test_two_teachers_for_one_domain_are_refused(tmp_path: Path) -> None:
    both = ("teachers.math.domains=[chart]", "teachers.other={model: c, domains: [chart]}")
    assert "domain 'chart' belongs to two teachers: math and other" in problems(tmp_path, RECIPE, *both)
    assert "at most one teacher may be the default" in problems(tmp_path, RECIPE, "teachers.other={model: c}")


def test_a_missing_recipe_says_where_recipes_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scripts/recipes"):
        load_config(TrainConfig, tmp_path / "gone.yaml")


def test_the_resolved_settings_read_back_equal(tmp_path: Path) -> None:
    config = load(tmp_path, RECIPE, "balance.ratio=.inf", "optim.betas=[0.8, 0.9]", "loss.gap_mask=null")
    assert TrainConfig.model_validate(yaml.safe_load(dump_config(config))) == config


def test_differences_name_the_settings() -> None:
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5}, "e": 6}
    assert config_diff(old, new) == ["b.c: 2 -> 5", "b.d: 3 -> None", "e: None -> 6"]


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "scripts" / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_is_valid_and_begins_with_its_launch_command(recipe: Path) -> None:
    config = load_config(TrainConfig, recipe)
    head = [line for line in recipe.read_text(encoding="utf-8").splitlines()[:8] if line.startswith("#")]
    assert any(f"deepspeed scripts/train_mm.py scripts/recipes/{recipe.name}" in line for line in head)
    if isinstance(config.data.train, str) and config.data.train.startswith("data/"):
        assert (ROOT / config.data.train).exists()


def test_every_setting_is_documented() -> None:
    lines = describe(TrainConfig).splitlines()
    undocumented = [
        key
        for key, text in zip(lines[::2], lines[1::2], strict=True)
        if len(text.split()) < 2 and text.strip() != "0"
    ]
    assert not undocumented
