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
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from uniopd_mm.config import ModelConfig, TrainConfig, config_diff, dump_config
from uniopd_mm.distributed import World, close_world, init_world
from uniopd_mm.engines import LocalEngine, encode_groups, encode_prompt
from uniopd_mm.errors import AlignmentError, ConfigError, DataError, ResumeError, UniOPDError
from uniopd_mm.evaluation import evaluate, summarise, write_samples
from uniopd_mm.models import MultimodalLM, load_model
from uniopd_mm.models.loading import load_processor
from uniopd_mm.preflight import (
    Finding,
    check_context,
    check_head,
    check_servers,
    check_views,
    check_vocabularies,
    null_test,
    require_ok,
    token_table,
)
from uniopd_mm.prompts import PromptOrder, PromptReader, PromptSet, load_prompts, open_images
from uniopd_mm.report import Console, RunFolder, Trackers, plot_curves, summarize
from uniopd_mm.rollout import Group, fill
from uniopd_mm.teachers import AlignedTeacher, LocalTeacher, RemoteTeacher, TeacherPool, TeacherServer
from uniopd_mm.teachers.pool import route, served_domains
from uniopd_mm.training.checkpoint import export_model, list_checkpoints, load_checkpoint, save_checkpoint
from uniopd_mm.training.credit import assign_advantages
from uniopd_mm.training.launch import StopRequest
from uniopd_mm.training.metrics import rollout_metrics
from uniopd_mm.training.trainer import Trainer
from uniopd_mm.verifiers import VerifierPool, verifier_names

log = logging.getLogger(__name__)

FREE_TO_CHANGE = ("out", "steps", "prepare", "eval", "checkpoint", "report")
"""Settings that a resumed run may have changed: they do not alter what was computed so far."""

FREE_TO_CHANGE_OF_SERVERS = ("urls", "concurrency", "timeout_s", "retries", "api_key_env")
"""The same of a teacher's servers: where they are and how fast they are asked."""

GOLD_ANSWERS_CHECKED = 1000
"""Rows whose gold answers ``--check`` gives to their verifiers."""

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
        self.step = self._n_bad = 0

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
        # Teachers first: under ZeRO-3 everything loaded after the student's configuration would be partitioned.
        teacher_models = self._load_teachers()
        self.trainer = Trainer(config, world)
        self.student: MultimodalLM = self.trainer.student
        self.teachers = TeacherPool(
            config.teachers,
            {name: self._make_teacher(name, teacher_models[name]) for name in config.teachers},
            world,
        )
        self._require_views()
        self.engine = LocalEngine(self.student, config.rollout.concurrent_rollouts)
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

    def _load_teachers(self) -> dict[str, MultimodalLM | TeacherServer]:
        """Weights, or servers that have them; teachers with the same weights share them."""
        loaded: dict[str, MultimodalLM] = {}
        result: dict[str, MultimodalLM | TeacherServer] = {**self._connect_servers()}
        for name, settings in self.config.teachers.items():
            if settings.server is not None:
                continue
            key = settings.model_dump_json(include=set(ModelConfig.model_fields))
            if key not in loaded:
                loaded[key] = load_model(settings, self.world.device)
            result[name] = loaded[key]
        return result

    def _connect_servers(self) -> dict[str, TeacherServer]:
        """The servers of all teachers that have some, probed; all ranks stop when one rank finds a problem."""
        servers, problems = {}, []
        for name, settings in self.config.teachers.items():
            if settings.server is None:
                continue
            try:
                server = TeacherServer(name, settings, load_processor(settings))
                servers[name] = self._exit.enter_context(server)
                server.connect()
            except ConfigError as error:
                problems.append(str(error))
        problems = list(dict.fromkeys(self.world.gather(problems)))
        if problems:
            raise ConfigError(
                "\n  ".join([f"{len(problems)} problems with the teachers' servers:", *problems])
            )
        return servers

    def _make_teacher(self, name: str, source: MultimodalLM | TeacherServer) -> AlignedTeacher:
        config, student = self.config, self.student.processor
        if isinstance(source, TeacherServer):
            return RemoteTeacher(name, config.teachers[name], source, student)
        return LocalTeacher(
            name,
            config.teachers[name],
            source,
            student,
            config.rollout.concurrent_rollouts,
            config.distributed.micro_tokens,
        )

    def _max_prompt_tokens(self) -> int | None:
        """Positions of the student that a response of full length leaves for the prompt."""
        limit = getattr(self.student.text_config, "max_position_embeddings", None)
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
        with self.console.phase("eval"), self.trainer.whole_weights():
            samples = evaluate(
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
        metrics = {"step": self.step, **summarise(samples), **self.console.take_times()}
        if self.folder:
            write_samples(self.out / "eval" / f"step_{self.step:06d}.jsonl", samples)
        self._record(metrics)
        self.console.evaluation(self.step, metrics)

    # ------------------------------------------------------------------ keeping

    def log(self, groups: list[Group], margins: dict[str, float], update: dict[str, float]) -> None:
        """One line of metrics, and now and then the rollouts themselves."""
        times = self.console.take_times()
        seconds = sum(times.get(f"time/{phase}_s", 0.0) for phase in ("sample", "verify", "score", "update"))
        metrics = rollout_metrics(groups, self.world)
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
        """``--check``: settings, data, templates, alignment and the null test on real prompts; no training."""
        config, console = self.config, self.console
        console.check("settings", f"{len(config.teachers)} teachers, student {config.student.model}", True)
        for name, prompts in (("data train", self.train_prompts), ("data eval", self.eval_prompts)):
            if prompts is not None:
                domains = ", ".join(f"{d} {n}" for d, n in sorted(prompts.domains().items()))
                text = f"{len(prompts)} prompts ({domains}), {len(prompts.bad_rows)} bad rows"
                console.check(name, text, True)
                for row in prompts.bad_rows[:5]:
                    console.note(f"  {row.source}: {row.reason}")
        groups = self.preflight_groups()
        findings = [self._check_gold_answers(), *self.preflight(groups)]
        for finding in findings:
            console.check(finding.name, finding.text, finding.ok)
        self._print_token_tables(groups)
        if self.world.is_main:  # in one line, to be copied
            print(
                f"train with: deepspeed {shlex.join(word for word in command if not word.startswith('--'))}"
            )
        return 1 if any(f.ok is False for f in findings) else 0

    def _check_gold_answers(self) -> Finding:
        """Gold answers that their verifiers can use; the rest would give unknown outcomes for ever."""
        some = self.train_prompts[:GOLD_ANSWERS_CHECKED]
        whys = zip(some, self.verifiers.check_golds(some), strict=True)
        unusable = [f"{prompt.source}: {why}" for prompt, why in whys if why]
        text = f"{len(some) - len(unusable)} of the first {len(some)} can be verified"
        is_ok = len(unusable) <= self.config.data.max_bad_share * len(some)
        return Finding("gold answers", "; ".join([text, *unusable[:5]]), is_ok)

    def require_preflight(self) -> None:
        """The same checks at the start of a run; it does not start when one fails."""
        findings = self.preflight(self.preflight_groups())
        for finding in findings:
            self.console.check(finding.name, finding.text, finding.ok)
        require_ok(findings)

    def preflight_groups(self) -> list[Group]:
        """Two rollouts each of the first prompts of every domain and number of images, sampled by the student."""
        chosen: dict[tuple[str, int], list[Group]] = {}
        for index in range(min(len(self.train_prompts), 256)):
            prompt = self.train_prompts[index]
            found = chosen.setdefault((prompt.domain, len(prompt.images)), [])
            if len(found) < 2:
                slot = sum(map(len, chosen.values()))
                with contextlib.suppress(DataError):  # skipped and counted when its turn comes
                    found += encode_groups([(slot, prompt, open_images(prompt))], self.student.processor)
        groups = [g for found in chosen.values() for g in found]
        short = self.config.rollout.model_copy(
            update={"max_new_tokens": min(64, self.config.rollout.max_new_tokens)}
        )
        with self.trainer.whole_weights():
            groups = self.engine.sample(groups, 2, short, (self.config.seed, 0))
            return self.trainer.score_student(groups, sampler_matches=False)

    def preflight(self, groups: list[Group]) -> list[Finding]:
        """All checks on ``groups``; every rank makes the same ones."""
        config = self.config
        with self.trainer.whole_weights():
            findings = [
                check_head(self.student, groups),
                check_context(self.student, groups, config.rollout.max_new_tokens),
                *check_servers(self.teachers),
                *check_vocabularies(self.teachers),
                *check_views(self.teachers, groups),
            ]
            for name, teacher in self.teachers.teachers.items():
                if not isinstance(teacher, AlignedTeacher):
                    continue
                served = [g for g in groups if route(config.teachers, g.prompt.domain) == name]
                findings.append(null_test(self.student, teacher, served, config))
        return findings

    def _print_token_tables(self, groups: list[Group]) -> None:
        for group in {g.prompt.domain: g for g in self.teachers.score(groups)}.values():
            rollout = group.rollouts[0]
            self.console.note(f"{group.prompt.id} ({group.prompt.domain}), scored by {rollout.teacher}:")
            for row in token_table(group, self.student):
                teacher = "   masked" if row["teacher_lp"] is None else f"{row['teacher_lp']:9.3f}"
                self.console.note(
                    f"  {row['token']!r:>16} {row['id']:>7} student {row['student_lp']:8.3f} teacher {teacher}"
                )


def _without(settings: dict[str, Any], free: Container[str]) -> dict[str, Any]:
    """Settings of a run without those that may change when it is resumed."""
    kept = {k: v for k, v in settings.items() if k not in free}
    for name, teacher in kept["teachers"].items():
        if teacher.get("server"):
            server = {k: v for k, v in teacher["server"].items() if k not in FREE_TO_CHANGE_OF_SERVERS}
            kept = {**kept, "teachers": {**kept["teachers"], name: {**teacher, "server": server}}}
    return kept


def device_name(world: World) -> str:
    """E.g. ``8 x NVIDIA H100`` or ``2 x CPU``."""
    import torch

    kind = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    return f"{world.size} x {kind}"
