"""One training run: everything ``scripts/train_mm.py`` needs besides the loop itself."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Container
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from uniopd_mm.config import TrainConfig
from uniopd_mm.distributed import World, close_world, init_world
from uniopd_mm.engines import (
    Engine,
    EngineError,
    LocalEngine,
    ServerEngine,
    encode_prompt,
    require_comparable,
)
from uniopd_mm.errors import AlignmentError, ConfigError, ResumeError, UniOPDError
from uniopd_mm.evaluation import evaluate, summarise, write_scored
from uniopd_mm.models import MultimodalLM, context_length
from uniopd_mm.prompts import PromptOrder, PromptReader, PromptSet, load_prompts
from uniopd_mm.report import Console, RunFolder, Trackers, plot_curves, summarize
from uniopd_mm.rollout import Group, fill
from uniopd_mm.settings import config_diff, dump_config
from uniopd_mm.teachers.loading import open_teachers
from uniopd_mm.teachers.pool import route, served_domains
from uniopd_mm.training.check import check, require_preflight
from uniopd_mm.training.checkpoint import export_model, list_checkpoints, load_checkpoint, save_checkpoint
from uniopd_mm.training.credit import assign_advantages
from uniopd_mm.training.launch import StopRequest
from uniopd_mm.training.metrics import rollout_metrics
from uniopd_mm.training.sync import WeightSync, require_match
from uniopd_mm.training.trainer import Trainer
from uniopd_mm.verifiers import VerifierPool, verifier_names

log = logging.getLogger(__name__)

PHASES = ("sync", "sample", "verify", "score", "update")
"""Of a step; evaluation and checkpoints come between steps."""

FREE_TO_CHANGE = ("out", "steps", "prepare", "eval", "checkpoint", "report", "score_cache")
"""Settings that a resumed run may have changed: they do not alter what was computed so far."""

FREE_TO_CHANGE_OF_SERVERS = ("urls", "concurrency", "timeout_s", "retries", "api_key_env", "sync_folder")
"""The same of servers: where they are and how fast they are asked."""

LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "OMP_NUM_THREADS",
)
"""What describes a rank, and must not reach a command that is none."""


class Run:
    """A run folder with its world, data, student, teachers and logs.  A context manager."""

    def __init__(self, config: TrainConfig, stop: StopRequest, fresh: bool = False) -> None:
        self.config, self.stop, self.fresh = config, stop, fresh
        self.out = Path(config.out)
        self.step = self.n_failed = self._n_bad = 0

    def __enter__(self) -> Run:
        config = self.config
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        self.world = init_world(config.distributed.timeout_s)
        if not (self.world.is_main and sys.stderr.isatty()):
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        self._exit = contextlib.ExitStack()
        self._exit.callback(close_world)
        try:
            self._set_up()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    # ------------------------------------------------------------------ setting up

    def _set_up(self) -> None:
        config, world = self.config, self.world
        self._prepare()
        checkpoint = self._open_folder()
        self._load_data()
        self.teachers = open_teachers(config, world, self._exit)
        self._require_views()
        self.trainer = Trainer(config, world)
        self.student: MultimodalLM = self.trainer.student
        self.engine, self.weight_sync = self._open_engine()
        self.verifiers = self._exit.enter_context(VerifierPool(config.verifier))
        self.reader = PromptReader(
            self.train_prompts,
            PromptOrder(len(self.train_prompts), config.seed, config.data.shuffle),
            config.rollout.prompts_per_step,
            config.data.max_bad_share,
            encode=partial(encode_prompt, self.student.processor, max_tokens=self._max_prompt_tokens()),
        )
        self.is_resumed = checkpoint is not None
        if checkpoint is not None:
            load_checkpoint(self.trainer, world, checkpoint)
            self.step, self.n_skipped = checkpoint.step, checkpoint.state["skipped"]
        self._start_reporting()
        self.sync_weights()

    def _prepare(self) -> None:
        """Run the recipe's ``prepare`` command on the first rank of each machine; the others wait."""
        if self.config.prepare and self.world.local_rank == 0:
            command = shlex.split(self.config.prepare)
            if command[0] == "python":
                command[0] = sys.executable
            environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
            with subprocess.Popen(command, env=environment) as process:
                while process.poll() is None:
                    time.sleep(0.1)
                    if self.stop.reason:
                        process.terminate()
                        process.wait()
                        raise UniOPDError(
                            f"stopped while preparing ({self.stop.reason}); the same command starts again"
                        )
            if process.returncode:
                raise UniOPDError(
                    f"prepare failed with exit status {process.returncode}: {self.config.prepare}"
                )
        self.world.barrier()

    def _open_folder(self) -> Any:
        """Continue, or begin, the run folder; refuse other settings than those it was begun with."""
        if self.fresh and self.world.is_main and self.out.exists():
            aside = self.out.with_name(f"{self.out.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            os.replace(self.out, aside)
            print(f"moved {self.out} to {aside}")
        self.world.barrier()
        checkpoints = list_checkpoints(self.out / "checkpoints")
        old = self.out / "config.yaml"
        if old.exists() and checkpoints:
            self._refuse_changes(yaml.safe_load(old.read_text(encoding="utf-8")))
        self.world.barrier()  # nobody writes the folder before everybody has read it
        return checkpoints[-1] if checkpoints else None

    def _refuse_changes(self, before: dict[str, Any]) -> None:
        free = set(FREE_TO_CHANGE) | ({"steps"} if self.config.optim.schedule == "constant" else set())
        now = yaml.safe_load(dump_config(self.config))
        changes = config_diff(_without(before, free), _without(now, free))
        if changes:
            raise ResumeError(
                f"{self.out} was begun with other settings:\n    "
                + "\n    ".join(changes)
                + "\n  Give the old values, "
                "say out=ANOTHER_FOLDER, or --fresh to move the old run aside."
            )

    def _load_data(self) -> None:
        config = self.config
        options = {
            "domains": served_domains(config.teachers),
            "verifiers": verifier_names(),
            "max_bad_share": config.data.max_bad_share,
            "seed": config.seed,
        }
        self.train_prompts: PromptSet = load_prompts(config.data.train, **options)
        self.n_skipped = len(self.train_prompts.bad_rows)
        self.eval_prompts: PromptSet | None = None
        if config.data.eval is not None:
            self.eval_prompts = load_prompts(config.data.eval, **options)

    def _open_engine(self) -> tuple[Engine, WeightSync | None]:
        """What samples: this process, or servers and what keeps their weights up to date."""
        config, settings = self.config, self.config.rollout.server
        if settings is None:
            return LocalEngine(self.student, config.rollout.concurrent_rollouts), None
        n_rows = self.student.transformer.get_output_embeddings().out_features
        engine = self._exit.enter_context(ServerEngine(settings, self.student.processor, n_rows))
        with self.world.together(ConfigError):
            engine.connect()
            require_comparable(engine, config)
        return engine, WeightSync(engine, self.trainer, self.world, settings, self.out)

    def _max_prompt_tokens(self) -> int | None:
        """Positions of the student that a response of full length leaves for the prompt."""
        limit = context_length(self.student.text_config)
        return None if limit is None else limit - self.config.rollout.max_new_tokens

    def _require_views(self) -> None:
        """Every teacher can be shown every prompt of its domains; the ranks share the rows."""
        problems = []
        for index in self.world.share(len(self.train_prompts)):
            prompt = self.train_prompts[index]
            teacher = self.teachers.teachers[route(self.config.teachers, prompt.domain)]
            try:
                teacher.messages(prompt)
            except AlignmentError as error:
                problems.append(str(error))
        problems = self.world.gather(problems)
        if problems:
            more = f"\n  and {len(problems) - 10} more rows" if len(problems) > 10 else ""
            raise AlignmentError(
                "\n  ".join([f"{len(problems)} rows that their teacher cannot see:", *problems[:10]]) + more
            )

    def _start_reporting(self) -> None:
        config, world = self.config, self.world
        self.folder = RunFolder(self.out) if world.is_main else None
        history: list[dict[str, Any]] = []
        if self.folder:
            self.folder.truncate_metrics(self.step if self.is_resumed else -1)
            history = self.folder.read_metrics()
            self.folder.write_header(dump_config(config), device=device_name(world), world_size=world.size)
            if self.train_prompts.bad_rows:
                self.folder.append_skipped(self.train_prompts.bad_rows)
            self._exit.callback(self.folder.close)
        self.trackers = self._exit.enter_context(
            Trackers(
                config.report.trackers,
                self.out,
                config.model_dump(mode="json"),
                rank=world.rank,
                start_step=self.step,
            )
        )
        self.console = self._exit.enter_context(Console(world.rank, config.steps, self.step, history=history))
        self.console.header(
            student=config.student.model,
            teachers={name: t.model for name, t in config.teachers.items()},
            device=device_name(world),
            run=str(self.out),
        )

    # ------------------------------------------------------------------ the stages of a step

    def draw(self, step: int) -> list[Group]:
        """This rank's groups of a step, images opened and prompts encoded; the same slots on any number of ranks."""
        mine = self.world.share(self.config.rollout.prompts_per_step)
        return [
            Group(d.prompt, d.encoded, (), d.images, d.slot, weight_version=self.trainer.updates)
            for d in self.reader.draw(step, mine)
        ]

    def sample(self, groups: list[Group]) -> list[Group]:
        """Fill the rollouts, and what the student thinks of them; teachers behind servers begin with each group that is
        done."""
        config = self.config.rollout
        self.sync_weights()
        with self.sampling_weights(), self.world.together(EngineError, ConfigError):
            groups = self.engine.sample(
                groups, config.n, config, (self.config.seed, self.step), finished=self.teachers.start
            )
            self.n_failed = len(self.engine.failed)
        with self.trainer.whole_weights():
            groups = self.trainer.score_student(groups, self.engine.matches_trainer)
            groups = self.trainer.score_in_modal(groups, self.teachers.in_modal_weight)
        if config.server is not None and config.server.sync != "never" and self.config.loss.mismatch_cap:
            require_match(groups, self.world, config.server.max_mismatch)
        return groups

    def sync_weights(self) -> None:
        """Give servers that sample the student's weights, if that is due."""
        if self.weight_sync is not None:
            with self.console.phase("sync"):
                self.weight_sync.update()

    def sampling_weights(self) -> AbstractContextManager[None]:
        """Inside, the engine can sample: whole weights on every rank, where it samples with them."""
        return self.trainer.whole_weights() if self.engine.matches_trainer else contextlib.nullcontext()

    def verify(self, groups: list[Group]) -> list[Group]:
        """Fill every rollout's outcome."""
        return fill(
            groups, "outcome", self.verifiers.check([(g.prompt, r.text) for g in groups for r in g.rollouts])
        )

    def assign_advantages(self, groups: list[Group]) -> tuple[list[Group], dict[str, float]]:
        """Balance and calibrate over the batch of all ranks."""
        return assign_advantages(groups, self.config, self.world, self.step)

    def evaluate(self) -> None:
        """Held-out accuracy at the current step, logged; samples are written beside it."""
        if self.eval_prompts is None or not self.config.eval.every:
            return
        settings = self.config.eval
        limit = (
            len(self.eval_prompts) if settings.limit is None else min(settings.limit, len(self.eval_prompts))
        )
        prompts = [self.eval_prompts[i] for i in range(limit)]
        self.sync_weights()
        with self.console.phase("eval"), self.sampling_weights():
            scored = evaluate(
                self.engine,
                self.student.processor,
                prompts,
                self.verifiers,
                settings.sampling,
                self.world,
                n=settings.n,
                batch=settings.batch,
                seed=self.config.seed,
            )
        metrics = {"step": self.step, **summarise(prompts, scored), **self.console.take_times()}
        if self.folder:
            write_scored(self.out / "eval" / f"step_{self.step:06d}.jsonl", prompts, scored)
        self._record(metrics)
        self.console.evaluation(self.step, metrics)

    # ------------------------------------------------------------------ keeping

    def log(self, groups: list[Group], margins: dict[str, float], update: dict[str, float]) -> None:
        """One line of metrics, and now and then the rollouts themselves."""
        times = self.console.take_times()
        seconds = sum(times.get(f"time/{phase}_s", 0.0) for phase in PHASES)
        metrics = rollout_metrics(groups, self.world, self.n_failed, self.trainer.updates - 1)
        n_tokens = metrics["rollout/length"] * self.config.rollout.prompts_per_step * self.config.rollout.n
        bad_rows = self.world.gather(self.reader.bad_rows[self._n_bad :])
        self._n_bad = len(self.reader.bad_rows)
        self.n_skipped += len(bad_rows)
        metrics |= {
            "step": self.step,
            "train/margin": margins["margin_before"],
            "train/margin_after": margins["margin_after"],
            "train/inverted_share": margins["inverted_share_before"],
            "train/inverted_share_after": margins["inverted_share_after"],
            "train/mixed_groups": margins["n_mixed_groups"],
            "train/return_correct": margins["return_correct"],
            "train/return_incorrect": margins["return_incorrect"],
            **{f"train/{k}": v for k, v in update.items()},
            **times,
            "perf/tokens_per_s": n_tokens / max(seconds, 1e-9),
            "data/skipped": self.n_skipped,
        }
        if self.folder and bad_rows:
            self.folder.append_skipped(bad_rows)
        self._record(metrics)
        every = self.config.report.rollouts_every
        if self.folder and every and (self.step % every == 0 or self.step == 1):
            decode = self.student.processor.decode_tokens
            self.folder.write_rollouts(self.step, groups, decode, self.config.report.rollouts_per_step)
        self.console.step(self.step, metrics)

    def _record(self, metrics: dict[str, Any]) -> None:
        if self.folder:
            self.folder.append_metrics(metrics)
        self.trackers.log(metrics)

    def is_due(self, every: int) -> bool:
        """Every so many steps, and after the last."""
        return bool(every) and (self.step % every == 0 or self.step == self.config.steps)

    def should_stop(self) -> bool:
        """A stop was asked for on any rank; every rank leaves the loop at the same step."""
        return self.world.any(bool(self.stop.reason))

    def save(self) -> None:
        """A checkpoint of the current step."""
        with self.console.phase("save"):
            root, keep = self.out / "checkpoints", self.config.checkpoint.keep
            save_checkpoint(self.trainer, self.world, root, self.step, {"skipped": self.n_skipped}, keep)

    def finish(self) -> int:
        """Save what is not saved yet; after the last step export the model and print the result.  Exit status."""
        newest = list_checkpoints(self.out / "checkpoints")
        if not newest or newest[-1].step != self.step:
            self.save()
        if self.step < self.config.steps:
            reasons = [r for r in self.world.gather([self.stop.reason]) if r]
            self.console.note(
                f"stopped after step {self.step} of {self.config.steps} ({reasons[0]}); saved. The same command goes on."
            )
            return 0
        export_model(self.trainer, self.world, self.out / "model")
        if self.folder:
            self.console.close()
            plot_curves(self.folder.metrics, self.out / "curves.png")
            self.console.table(summarize(self.folder.read_metrics()))
            self.console.note(f"run     {self.out}")
            self.console.note(f"curves  {self.out / 'curves.png'}")
            self.console.note(f"model   {self.out / 'model'}")
        return 0

    # ------------------------------------------------------------------ looking before training

    def check(self, command: list[str]) -> int:
        """``--check``: everything that can be looked at without training.  Exit status."""
        return check(self, command)

    def require_preflight(self) -> None:
        """The cheap checks at the start of a run; it does not start when one fails."""
        require_preflight(self)


def _without(settings: dict[str, Any], free: Container[str]) -> dict[str, Any]:
    """Settings of a run without those that may change when it is resumed."""
    kept = {k: v for k, v in settings.items() if k not in free}
    kept["teachers"] = {name: _without_places(teacher) for name, teacher in kept["teachers"].items()}
    return {**kept, "rollout": _without_places(kept["rollout"])}


def _without_places(settings: dict[str, Any]) -> dict[str, Any]:
    if not settings.get("server"):
        return settings
    server = {k: v for k, v in settings["server"].items() if k not in FREE_TO_CHANGE_OF_SERVERS}
    return {**settings, "server": server}


def device_name(world: World) -> str:
    """E.g. ``8 x NVIDIA H100`` or ``2 x CPU``."""
    import torch

    kind = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    return f"{world.size} x {kind}"
