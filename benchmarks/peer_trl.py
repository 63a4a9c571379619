"""The same work in TRL's ``DistillationTrainer``, in one process with one thread; prints its measurements as JSON.

    python benchmarks/peer_trl.py small

Its trainer samples one response per row and has no groups, so each row is repeated n times and a micro-batch is one
group.  Reverse divergence over the whole vocabulary (``beta=1``), fp32, all weights trained, no gradient checkpointing,
temperature 1, responses forced to their full length.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from cases import Case
from command import add_arguments, chosen_case, write_result
from floor import count_flops, flop_profile
from measure import Meter
from models import ensure, read_prompts
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

STAGES = {"vision": "vision_tower", "projector": "multi_modal_projector", "language": "language_model"}


class MeasuredTrainer(DistillationTrainer):
    """The stock trainer with a clock around its phases; it computes nothing itself."""

    def __init__(self, meter: Meter, **options: Any) -> None:
        self.meter = meter
        super().__init__(**options)

    def get_batch_samples(self, *args: Any) -> Any:
        with self.meter.phase("read"):
            return super().get_batch_samples(*args)

    def _generate_single_turn(self, *args: Any) -> Any:
        with self.meter.phase("sample"):
            return super()._generate_single_turn(*args)

    def _generate_and_score_completions(self, *args: Any) -> Any:
        with self.meter.phase("rollout"):  # the processor twice, and sampling
            return super()._generate_and_score_completions(*args)

    def _get_last_hidden_state(self, model: Any, *args: Any, **inputs: Any) -> Any:
        is_teacher = model is self.accelerator.unwrap_model(self.teacher_model)
        with self.meter.phase("score" if is_teacher else "update"):
            return super()._get_last_hidden_state(model, *args, **inputs)

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        with self.meter.phase("loss"):  # student, teacher and the divergence
            return super().compute_loss(*args, **options)

    def training_step(self, *args: Any, **options: Any) -> Any:
        with self.meter.phase("training_step"):  # rollout, loss and backward
            return super().training_step(*args, **options)


class Steps(TrainerCallback):
    """Divides the time into steps, and counts the operations of the last."""

    def __init__(self, meter: Meter, n_steps: int, recorder: Any) -> None:
        self.meter, self.n_steps, self.recorder = meter, n_steps, recorder
        self._step = ExitStack()
        self.summary: dict[str, Any] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._step.enter_context(self.meter.phase("step"))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step ends where the next begins: reading its rows belongs to it."""
        self._step.close()
        self.meter.end_step()
        if state.global_step == self.n_steps:
            self.summary = self.meter.summary(self.n_steps - 1)
        self._step.enter_context(self.meter.phase("step"))
        if state.global_step == self.n_steps and self.recorder is not None:
            self._step.enter_context(self.recorder)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._step.close()


def measure(case: Case, work: Path, freeze: list[str], n_steps: int, with_flops: bool) -> dict[str, Any]:
    """``n_steps`` steps, the first a warm-up."""
    folder, meter = ensure(case, work), Meter()
    student, teacher = (
        AutoModelForImageTextToText.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    for stage in freeze:
        student.base_model.get_submodule(STAGES[stage]).requires_grad_(False)
    recorder = flop_profile() if with_flops else None
    n_all = n_steps + int(with_flops)
    steps = Steps(meter, n_steps, recorder)
    with tempfile.TemporaryDirectory() as out:
        trainer = MeasuredTrainer(
            meter,
            model=student,
            teacher_model=teacher,
            processing_class=AutoProcessor.from_pretrained(folder / "student", padding_side="left"),
            train_dataset=make_dataset(case, folder, n_all),
            args=make_config(case, out, n_all),
            callbacks=[steps],
        )
        meter.count_images("student", student.base_model.get_submodule("vision_tower"))
        meter.count_images("teacher", teacher.base_model.get_submodule("vision_tower"))
        meter.start(student, teacher)
        trainer.train()
    length = {
        m["completions/mean_length"] for m in trainer.state.log_history if "completions/mean_length" in m
    }
    if length != {float(case.response)}:
        raise RuntimeError(f"responses of {sorted(length)} tokens; all must have {case.response}")
    result = {**steps.summary}
    result |= {name: split(result[name]) for name in ("cpu_s", "wall_s")}
    if recorder is not None:
        result["flops"] = count_flops(recorder)
    return result


def split(seconds: Mapping[str, float]) -> dict[str, float]:
    """The phases as ours are named: ``encode``, ``sample``, ``score``, ``update`` and the whole ``step``."""
    encode = seconds["read"] + seconds["rollout"] - seconds["sample"]
    return {
        "encode": encode,
        "sample": seconds["sample"],
        "score": seconds["score"],
        "update": seconds["step"] - encode - seconds["sample"] - seconds["score"],
        "step": seconds["step"],
    }


def make_dataset(case: Case, folder: Path, n_steps: int) -> Any:
    """Every row n times in a row, for as many steps as are run."""
    import datasets

    prompts = read_prompts(folder)
    rows = [prompts[i % len(prompts)] for i in range(case.prompts * n_steps) for _ in range(case.n)]
    table = [{"prompt": [{"role": "user", "content": r["question"]}], "image": r["image"]} for r in rows]
    return datasets.Dataset.from_list(table).cast_column("image", datasets.Image())


def make_config(case: Case, out: str, n_steps: int) -> DistillationConfig:
    return DistillationConfig(
        output_dir=out,
        per_device_train_batch_size=case.n,
        gradient_accumulation_steps=case.prompts,
        max_steps=n_steps,
        learning_rate=1e-5,
        beta=1.0,
        temperature=1.0,
        max_completion_length=case.response,
        generation_kwargs={"min_new_tokens": case.response},
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        shuffle_dataset=False,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    write_result(measure(chosen_case(args), args.work, args.freeze, args.steps, args.flops), args.json)


if __name__ == "__main__":
    main()
