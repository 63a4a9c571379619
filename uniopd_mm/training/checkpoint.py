"""Checkpoints that are either whole or not there, and the final model as a normal Hugging Face folder.

``checkpoints/step_000050/`` is written as ``step_000050.tmp/``; rank 0 adds a manifest with the size of every file and
renames the folder, and only then are older ones removed.  A checkpoint without a valid manifest does not exist.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uniopd_mm.distributed import World
from uniopd_mm.errors import ResumeError
from uniopd_mm.models import MultimodalLM, build_student
from uniopd_mm.training.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TAG = "state"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    world_size: int
    zero_stage: int
    state: dict[str, Any]
    """What else the loop needs to go on; everything random is derived from (seed, step), so this is little."""


def save_checkpoint(
    trainer: Trainer, world: World, root: Path, step: int, state: dict[str, Any], keep: int
) -> Path:
    """Write the training state of all ranks after ``step`` steps; keeps the ``keep`` newest."""
    final, partial = root / f"step_{step:06d}", root / f"step_{step:06d}.tmp"
    if world.is_main:
        for leftover in root.glob("*.tmp"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        _require_space(root, trainer.student)
    world.barrier()
    trainer.engine.save_checkpoint(str(partial), tag=TAG, client_state={"updates": trainer.updates})
    world.barrier()
    if world.is_main:
        manifest = {
            "step": step,
            "world_size": world.size,
            "zero_stage": trainer.config.distributed.zero_stage,
            "state": state,
            "files": {
                str(p.relative_to(partial)): p.stat().st_size
                for p in sorted(partial.rglob("*"))
                if p.is_file()
            },
        }
        _write_synced(partial / "manifest.json", json.dumps(manifest, indent=1))
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in list_checkpoints(root)[:-keep]:
            shutil.rmtree(old.path)
    world.barrier()
    return final


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """Whole checkpoints, oldest first."""
    found = [c for path in root.glob("step_*") if (c := _read(path)) is not None]
    return sorted(found, key=lambda c: c.step)


def load_checkpoint(trainer: Trainer, world: World, checkpoint: Checkpoint) -> None:
    """Put the trainer back to where ``checkpoint`` was written."""
    stage = trainer.config.distributed.zero_stage
    if (checkpoint.world_size, checkpoint.zero_stage) != (world.size, stage):
        raise ResumeError(
            f"{checkpoint.path} was written by {checkpoint.world_size} ranks with zero_stage={checkpoint.zero_stage}, "
            f"this run has {world.size} ranks and zero_stage={stage}. Launch with --num_gpus {checkpoint.world_size} "
            f"distributed.zero_stage={checkpoint.zero_stage}, or start a new run with another `out`."
        )
    path, client_state = trainer.engine.load_checkpoint(str(checkpoint.path), tag=TAG)
    if path is None:
        raise ResumeError(f"{checkpoint.path}: DeepSpeed could not read the state in it")
    trainer.updates = client_state["updates"]


def export_model(trainer: Trainer, world: World, folder: Path) -> None:
    """The student as a normal Hugging Face folder (weights, configuration, processor, chat template).

    LoRA: adapters are merged here, and saved alone, without other trained stages, beside it as ``FOLDER_adapter``.
    """
    weights = gathered_state_dict(trainer.student, trainer.config.distributed.zero_stage)
    trainer.release_zero3_config()  # from_pretrained below must not partition
    if world.is_main:
        partial = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        if trainer.config.student.lora is not None:
            trainer.student.model.save_pretrained(
                folder.with_name(folder.name + "_adapter"), state_dict=weights
            )
        whole_model(trainer, weights).save_pretrained(partial)
        trainer.student.processor.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    world.barrier()


def whole_model(trainer: Trainer, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The trained model as transformers would have loaded it: unpartitioned, adapters merged."""
    settings = trainer.config.student
    if settings.lora is None and trainer.config.distributed.zero_stage != 3:
        return trainer.student.model
    # Anew: merging would change the student that trains, and a partitioned model saves under other names than it
    # was loaded from.
    model = build_student(settings)
    model.load_state_dict(weights)
    return model if settings.lora is None else model.merge_and_unload()


def gathered_state_dict(student: MultimodalLM, zero_stage: int) -> dict[str, torch.Tensor]:
    """All weights on the CPU of rank 0, one parameter at a time (other ranks: empty)."""
    if zero_stage != 3:
        return {k: v.detach().cpu() for k, v in student.model.state_dict().items()}
    import deepspeed
    import torch.distributed as dist

    weights = {k: v.detach().cpu().clone() for k, v in student.model.named_buffers() if v is not None}
    for name, parameter in student.model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    persistent = set(student.model.state_dict())
    return {k: v for k, v in weights.items() if k in persistent} if dist.get_rank() == 0 else {}


def _read(path: Path) -> Checkpoint | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return None
    return Checkpoint(
        path, manifest["step"], manifest["world_size"], manifest["zero_stage"], manifest["state"]
    )


def _require_space(root: Path, student: MultimodalLM) -> None:
    n = sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters())
    n_trained = sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters() if p.requires_grad)
    needed = 4 * n + 12 * n_trained  # weights, and fp32 master weights with two moments
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(
            f"{root}: a checkpoint needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
