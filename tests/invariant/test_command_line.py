"""What people type, what they see, and what they get when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import SCRIPT, launch, metrics, train, write_recipe
from rooms import load, make_groups, plain_logprobs
from safetensors.torch import load_file

from uniopd_mm.report import find_metric


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    return write_recipe(tmp_path_factory.mktemp("cli"), tiny_models, steps=2)


def change_rows(recipe: Path, change) -> str:
    """A copy of the training rows with ``change(i, row)`` applied; its path as an override."""
    source = recipe.parent / "data" / "rows.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for i, row in enumerate(rows):
        change(i, row)
    path = source.with_name("changed.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={path}"


def test_check_looks_at_everything_and_trains_nothing(recipe: Path) -> None:
    done = launch(recipe, "--check", f"out={recipe.parent / 'checked'}")
    assert done.returncode == 0, done.stderr
    for text in (
        "24 prompts (read 12, see 12)",
        "null test seer",
        "worst |A|",
        "16 of them image",
        "view text",
    ):
        assert text in " ".join(done.stdout.split()), text
    assert f"deepspeed {SCRIPT} {recipe}" in done.stdout
    assert not (recipe.parent / "checked" / "metrics.jsonl").exists()


def test_all_wrong_settings_are_reported_at_once(recipe: Path) -> None:
    done = launch(recipe, "optim.learning_rate=1", "rolout.n=3", "rollout.n=zero", "lr=2")
    assert done.returncode == 1
    for text in ("4 problems", "Did you mean 'rollout'?", "Did you mean 'optim.lr'?", "found 'zero'"):
        assert text in done.stderr, (text, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda row: row.update(images=["gone.png"] * len(row["images"])), "gone.png"),
        (lambda row: row.update(images=[*row["images"], row["images"][0]]), "image"),
        (lambda row: row.update(domain="nowhere"), "nowhere"),
        (lambda row: row.update(answer=""), "answer"),
    ],
    ids=["missing image", "placeholders", "unknown domain", "empty answer"],
)
def test_bad_rows_stop_the_run_before_training_with_their_place(recipe: Path, spoil, message: str) -> None:
    override = change_rows(recipe, lambda i, row: spoil(row) if i == 4 else None)
    done = launch(recipe, override, "data.max_bad_share=0", "--check", f"out={recipe.parent / 'bad'}")
    assert done.returncode == 1
    assert "changed.jsonl:5" in done.stderr and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_few_bad_rows_are_skipped_counted_and_listed(recipe: Path) -> None:
    data = recipe.parent / "data"

    def spoil(i: int, row: dict) -> None:
        if i == 4:
            row["answer"] = ""  # found when the data is read
        if i % 3 == 2:
            (data / "broken.png").write_bytes(b"not a picture")
            row["images"][0] = "broken.png"  # found when the image is opened

    run = train(
        recipe, change_rows(recipe, spoil), "data.max_bad_share=0.9", f"out={recipe.parent / 'skipping'}"
    )
    skipped = (run / "skipped.jsonl").read_text()
    assert "changed.jsonl:5" in skipped and "broken.png" in skipped
    assert metrics(run)[-2]["data/skipped"] == len(skipped.splitlines())
    assert [row["step"] for row in metrics(run)] == [
        0,
        1,
        2,
        2,
    ]  # the evaluation before, two steps, the one after


def test_a_text_only_teacher_without_a_view_of_the_image_is_refused(recipe: Path) -> None:
    override = change_rows(recipe, lambda i, row: row.pop("image_text"))
    done = launch(recipe, override, f"out={recipe.parent / 'blind'}")
    assert done.returncode == 1
    assert "image_text" in done.stderr and "allow_blind" in done.stderr
    assert not (recipe.parent / "blind" / "metrics.jsonl").exists()


def test_every_logged_metric_is_documented(recipe: Path) -> None:
    run = train(recipe, f"out={recipe.parent / 'documented'}", "eval.every=2")
    names = {name for row in metrics(run) for name in row} - {"step"}
    assert not {name for name in names if find_metric(name) is None}
    assert {"train/gap", "eval/accuracy", "time/update_s", "domain/see/gap"} <= names


def test_help_lists_every_setting_with_its_meaning(recipe: Path) -> None:
    done = launch(recipe, "--help")
    assert "calibration.delta = 0.0" in done.stdout and "Wanted margin" in done.stdout
    assert "teachers.NAME.view" in done.stdout


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_lora_trains_only_adapters_and_exports_merged_weights(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_models,
        family,
        steps=2,
        student={
            "model": str(tiny_models[family]),
            "dtype": "float32",
            "freeze": ["vision"],
            "lora": {"rank": 4},
        },
        eval={"every": 0},
        distributed={"zero_stage": 2},
    )
    run = train(recipe)
    before = load_file(tiny_models[family] / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed)
    assert any(
        "multi_modal_projector" in name or "merger" in name for name in changed
    )  # trained without adapter
    assert not any(
        "visual.blocks" in name or "vision_tower" in name or "embed_tokens" in name for name in changed
    )
    assert (run / "model_adapter" / "adapter_model.safetensors").stat().st_size < 1e6


def test_lora_under_zero3_on_two_ranks_is_the_same_run(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    student = {"model": str(tiny_models["llava"]), "dtype": "float32", "lora": {"rank": 4}}
    smooth = {"lr": 0.1, "eps": 1.0, "max_grad_norm": 100.0}
    recipe = write_recipe(tmp_path, tiny_models, steps=2, student=student, optim=smooth, eval={"every": 0})
    one = train(recipe, f"out={tmp_path / 'one'}")
    two = train(recipe, f"out={tmp_path / 'two'}", "distributed.zero_stage=3", ranks=2)
    wanted, ours = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    assert ours.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(
            ours[name], weight, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_bfloat16_trains_and_its_model_loads(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    bf16 = {"dtype": "bfloat16"}
    recipe = write_recipe(
        tmp_path,
        tiny_models,
        "qwen3_vl",
        steps=2,
        student={"model": str(tiny_models["qwen3_vl"]), **bf16},
        distributed={"zero_stage": 2},
        eval={"every": 0},
    )
    run = train(recipe)
    assert all(abs(row["train/gap"]) < 20 for row in metrics(run))
    assert any(
        row["rollout/mismatch"] > 0 for row in metrics(run)
    )  # rescored: the decode loop rounds differently
    model = load(run / "model")
    group = make_groups(model, (1,))[0]
    with torch.no_grad():
        assert torch.isfinite(plain_logprobs(model, group, torch.tensor([20, 21, 22]))).all()


def test_ranks_leave_no_shared_memory_behind(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """DeepSpeed keeps its buffers for ranks without a GPU in /dev/shm."""
    before = set(Path("/dev/shm").glob("deepspeed_*"))
    recipe = write_recipe(tmp_path, tiny_models, "llava", steps=1, eval={"every": 0})
    train(recipe, ranks=2)
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= before
