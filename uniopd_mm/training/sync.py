"""The student's weights on disk, for servers that sample with them.

``sync/weights_000012/`` holds the student after 12 optimizer steps, as a normal Hugging Face folder.  It is written as
``weights_000012.tmp`` and renamed, so that no server ever reads half of it; the two newest are kept.  A
``sync_folder`` belongs to one run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from uniopd_mm.config import RolloutServerConfig
from uniopd_mm.distributed import World
from uniopd_mm.engines import EngineError
from uniopd_mm.rollout import Group
from uniopd_mm.training.checkpoint import gathered_state_dict, whole_model
from uniopd_mm.training.trainer import Trainer

KEPT = 2
"""Folders that stay: the one that the servers have, and the one before."""


class HoldsWeights(Protocol):
    """An engine with a copy of the student's weights."""

    weight_version: int
    """Optimizer steps taken by the weights that it has."""
    synced: bool
    """They are of this run, not what its servers were started with."""

    def load_weights(self, folder: str, version: int) -> None:
        """Every server of the engine has the weights in ``folder`` from here on."""
        ...


class WeightSync:
    """Keeps an engine's copy of the student's weights at most ``sync_every`` optimizer steps old.

    No rank may be sampling while another calls :meth:`update`.
    """

    def __init__(
        self,
        engine: HoldsWeights,
        trainer: Trainer,
        world: World,
        settings: RolloutServerConfig,
        out: Path,
    ) -> None:
        self.engine, self.trainer, self.world, self.settings = engine, trainer, world, settings
        # Absolute: the servers were started elsewhere.
        self.root = (Path(settings.sync_folder) if settings.sync_folder else out / "sync").absolute()

    def update(self) -> bool:
        """Bring the servers up to date if they are due; whether they were.  Call on all ranks."""
        version = self.trainer.updates
        n_behind = version - self.engine.weight_version
        # What the servers were started with, or what another run left them with, is anybody's guess.
        is_due = not self.engine.synced or n_behind >= self.settings.sync_every
        if self.settings.sync == "never" or not is_due:
            return False
        folder = self.root / f"weights_{version:06d}"
        write_weights(self.trainer, self.world, folder)
        on_main(self.world, lambda: self.engine.load_weights(str(folder), version))
        self.engine.weight_version, self.engine.synced = version, True  # told on rank 0, true on all
        on_main(self.world, lambda: remove_older(self.root, folder))
        return True


def write_weights(trainer: Trainer, world: World, folder: Path) -> None:
    """The student's current weights as a Hugging Face folder, adapters merged.  Call on all ranks."""
    world.barrier()
    stage = trainer.config.distributed.zero_stage
    # Only under ZeRO-3 does it take all ranks to put the weights together.
    weights = gathered_state_dict(trainer.student, stage) if stage == 3 or world.is_main else {}
    trainer.release_zero3_config()  # from_pretrained in whole_model must not partition

    def write() -> None:
        partial = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        whole_model(trainer, weights).save_pretrained(partial)
        trainer.student.processor.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)

    on_main(world, write)


def remove_older(root: Path, newest: Path) -> None:
    """Remove all folders of weights but ``newest`` and those written last before it, and what a killed run left.

    By age, not by number: a run that resumes from an earlier step finds folders of later ones.
    """
    found = [p for p in root.glob("weights_??????") if p != newest]
    by_age = sorted(found, key=lambda path: path.stat().st_mtime_ns)
    for path in [*by_age[: len(by_age) - (KEPT - 1)], *root.glob("weights_*.tmp")]:
        shutil.rmtree(path)


def require_match(groups: list[Group], world: World, limit: float) -> None:
    """EngineError, on all ranks, when the tokens of a step are on average more than ``limit`` nats away from what the
    trainer thinks of them: the servers did not take the weights that they were given."""
    pairs = [(r.student_logprobs, r.sampler_logprobs) for g in groups for r in g.rollouts]
    total = world.sum(
        {
            "nats": sum(float((ours - theirs).abs().sum()) for ours, theirs in pairs if ours is not None),
            "tokens": float(sum(len(theirs) for _, theirs in pairs)),
        }
    )
    mean = total["nats"] / (total["tokens"] or 1.0)
    if mean > limit:
        raise EngineError(
            f"the servers' log-probabilities are {mean:.2g} nats a token away from the trainer's "
            f"(rollout.server.max_mismatch={limit:g}): they do not sample from the weights they were given. vLLM on a CPU, "
            "for one, keeps the old head of a model with tied embeddings. Train with the local engine, or raise the limit "
            "if these servers compute in much lower precision; the same command goes on from the last checkpoint."
        )


def on_main(world: World, action: Callable[[], None]) -> None:
    """``action`` on rank 0 while the others wait; when it fails there, it fails on every rank."""
    with world.together(Exception):
        if world.is_main:
            action()
