"""Our training step on one case, in one process with one thread; prints its measurements as JSON.

    python benchmarks/ours.py small                 step time, memory and their split
    python benchmarks/ours.py image --profile       where the time goes, operator by operator

A step does what scripts/train_mm.py does: open pictures and encode prompts, sample, set outcomes (drawn at random, since
a verifier's cost is not the question here), score by the teacher, balance and calibrate, update.  fp32, all weights
trained, no gradient checkpointing, temperature 1.
"""

# ruff: noqa: E402 (the environment is set before torch and DeepSpeed are imported)
from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without installation

from cases import Case
from command import add_arguments, chosen_case, write_result
from floor import count_flops, flop_profile
from measure import Meter, ModelClock
from models import ensure, read_prompts

from uniopd_mm.training.launch import prepare_environment

prepare_environment()

import torch

from uniopd_mm.config import TrainConfig
from uniopd_mm.distributed import close_world, init_world
from uniopd_mm.engines import LocalEngine, encode_groups
from uniopd_mm.models import MultimodalLM, load_model
from uniopd_mm.prompts import open_images
from uniopd_mm.rollout import Group, Outcome, Prompt, fill
from uniopd_mm.teachers import LocalTeacher
from uniopd_mm.training.credit import assign_advantages
from uniopd_mm.training.trainer import Trainer


class Ours:
    """Student, teacher and prompts of a case, ready to step."""

    def __init__(self, case: Case, folder: Path, freeze: list[str], n_steps: int, meter: Meter) -> None:
        self.case, self.meter = case, meter
        self.config = make_config(case, folder, freeze, n_steps)
        self.world = init_world(timeout_s=600.0)
        settings = self.config.teachers["teacher"]
        # Teacher first, as a training run does it.
        self.teacher_model = load_model(settings, self.world.device)
        self.trainer = Trainer(self.config, self.world)
        concurrent = self.config.rollout.concurrent_rollouts
        self.engine = LocalEngine(self.trainer.student, concurrent)
        self.teacher = LocalTeacher(
            "teacher", settings, self.teacher_model, self.trainer.student.processor, concurrent
        )
        self.prompts = [make_prompt(row) for row in read_prompts(folder)]
        self.models = {"student": self.trainer.student, "teacher": self.teacher_model}
        for owner, model in self.models.items():
            meter.count_images(owner, stock_model(model).base_model.get_submodule("vision_tower"))

    def step(self, index: int) -> list[Group]:
        """One optimizer step, measured."""
        case, config, phase = self.case, self.config, self.meter.phase
        with phase("step"):
            with phase("encode"):
                start = index * case.prompts
                chosen = [self.prompts[(start + i) % len(self.prompts)] for i in range(case.prompts)]
                drawn = [(slot, prompt, open_images(prompt)) for slot, prompt in enumerate(chosen)]
                groups = encode_groups(drawn, self.trainer.student.processor)
            with phase("sample"), self.trainer.whole_weights():
                groups = self.engine.sample(groups, case.n, config.rollout, (config.seed, index))
                groups = self.trainer.score_student(groups, self.engine.matches_trainer)
            groups = fill(groups, "outcome", draw_outcomes(case, index))
            with phase("score"):
                groups = self.teacher.score(groups, config.loss.score_temperature)
            with phase("advantages"):
                groups, _ = assign_advantages(groups, config, self.world, index)
            with phase("update"):
                self.trainer.update(groups, correct_mismatch=not self.engine.matches_trainer)
        self.meter.end_step()
        lengths = {len(r.response_ids) for g in groups for r in g.rollouts}
        if lengths != {case.response}:
            raise RuntimeError(f"responses of {sorted(lengths)} tokens; all must have {case.response}")
        return groups


def make_config(case: Case, folder: Path, freeze: list[str], n_steps: int) -> TrainConfig:
    """The settings of a run; nothing is balanced out, since the peer trains on every rollout."""
    return TrainConfig.model_validate(
        {
            "out": "unused",
            "steps": n_steps,
            "student": {"model": str(folder / "student"), "dtype": "float32", "freeze": freeze},
            "teachers": {"teacher": {"model": str(folder / "teacher"), "dtype": "float32"}},
            "data": {"train": "unused"},
            "rollout": {"prompts_per_step": case.prompts, "n": case.n, "max_new_tokens": case.response},
            "balance": {"ratio": None},
            "optim": {"lr": 1e-5},
            "distributed": {"zero_stage": 0},
        }
    )


def make_prompt(row: dict[str, str]) -> Prompt:
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    return Prompt(row["id"], ({"role": "user", "content": content},), (row["image"],), answer=row["answer"])


def draw_outcomes(case: Case, index: int) -> list[Outcome]:
    """Half of each group correct, at random places."""
    draw = random.Random(index)
    outcomes = []
    for _ in range(case.prompts):
        group = [Outcome(correct=i % 2 == 0) for i in range(case.n)]
        draw.shuffle(group)
        outcomes += group
    return outcomes


def stock_model(wrapper: MultimodalLM) -> Any:
    """The transformers model within."""
    from transformers import PreTrainedModel

    return next(module for module in wrapper.modules() if isinstance(module, PreTrainedModel))


def measure(case: Case, work: Path, freeze: list[str], n_steps: int, with_flops: bool) -> dict[str, Any]:
    """``n_steps`` steps, the first a warm-up, and one more with clocks inside the models."""
    folder, meter = ensure(case, work), Meter()
    ours = Ours(case, folder, freeze, n_steps + 2, meter)
    meter.start(*ours.models.values())
    for index in range(n_steps):
        ours.step(index)
    result = meter.summary(n_steps - 1)
    with ModelClock(meter, ours.models) as clock:
        groups = ours.step(n_steps)
    result |= {"model_cpu_s": dict(clock.cpu_s), "clocked_step_cpu_s": meter.steps[-1].cpu_s["step"]}
    result["prompt_tokens"] = sum(len(g.encoded.input_ids) for g in groups) / len(groups)
    if with_flops:
        with flop_profile() as recorded:
            ours.step(n_steps + 1)
        result["flops"] = count_flops(recorded)
    close_world()
    return result


def profile(case: Case, work: Path, freeze: list[str], rows: int) -> None:
    """Print the operators, then the Python functions, that one warm step spends its time in."""
    import cProfile
    import pstats

    ours = Ours(case, ensure(case, work), freeze, 4, Meter())
    ours.step(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as operators:
        ours.step(1)
    print(
        operators.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=48
        )
    )
    for kind, seconds in time_by_kind(operators).items():
        print(f"{kind:20s} {seconds:6.2f} CPU s")
    with cProfile.Profile() as functions:
        ours.step(2)
    for order in ("tottime", "cumulative"):
        pstats.Stats(functions).sort_stats(order).print_stats(rows)
    close_world()
    print({name: round(s, 3) for name, s in ours.meter.steps[1].cpu_s.items()}, "CPU s under torch.profiler")


def time_by_kind(operators: torch.profiler.profile) -> dict[str, float]:
    """CPU seconds of a profiled step in matrix products, in the fused attention kernels, and in all other operators."""
    kinds = {"matrix products": ("::mm", "::addmm", "::bmm", "::baddbmm", "convolution")}
    kinds["attention kernels"] = ("scaled_dot_product",)
    total = dict.fromkeys((*kinds, "other operators"), 0.0)
    for event in operators.key_averages():
        found = (kind for kind, names in kinds.items() if any(name in event.key for name in names))
        total[next(found, "other operators")] += event.self_cpu_time_total / 1e6
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--profile", action="store_true", help="print where one step's time goes, and stop")
    parser.add_argument("--rows", type=int, default=25, help="lines of each table of --profile")
    args = parser.parse_args()
    torch.set_num_threads(1)
    case = chosen_case(args)
    if args.profile:
        profile(case, args.work, args.freeze, args.rows)
        return
    result = measure(case, args.work, args.freeze, args.steps, args.flops)
    write_result(result, args.json)


if __name__ == "__main__":
    main()
