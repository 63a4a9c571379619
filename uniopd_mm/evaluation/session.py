"""One evaluation from request to files: load a task, answer it, score the answers, write what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniopd_mm.config import ModelConfig, RolloutServerConfig
from uniopd_mm.errors import ConfigError, UniOPDError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile
from uniopd_mm.evaluation.folder import write_task
from uniopd_mm.evaluation.generate import ROUND, generate, score
from uniopd_mm.evaluation.loading import check_columns, load_rows
from uniopd_mm.evaluation.modelid import model_identity
from uniopd_mm.evaluation.page import write_page
from uniopd_mm.evaluation.progress import ProgressLine
from uniopd_mm.evaluation.results import Scored, summarise_benchmark
from uniopd_mm.evaluation.samples import Sample, SampleStore, different
from uniopd_mm.evaluation.tasks import Task, data_task, load_task, require_few
from uniopd_mm.processors import ProcessorError

if TYPE_CHECKING:
    from typing import Self

    from uniopd_mm.distributed import World
    from uniopd_mm.engines import Engine
    from uniopd_mm.processors import VLMProcessor
    from uniopd_mm.verifiers import VerifierPool

SERVER_BATCH = 512
"""Prompts asked for together where servers do the batching."""


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, not loaded yet."""

    name: str
    preset: Preset
    folder: Path
    """Where its files go."""
    benchmark: Benchmark | None = None
    """None = rows of one's own, in ``data``."""
    data: Path | None = None
    preset_name: str = "paper"
    profile: Profile = "strict"
    source: Path | None = None
    split: str | None = None
    saved: Path | None = None
    """Samples to score instead of asking a model."""

    def check(self) -> None:
        """Read one row, so that a source that is not there is noticed before any model is loaded."""
        if self.benchmark is not None:
            rows = load_rows(self.benchmark, self.source, self.split, limit=1)
            check_columns(self.benchmark, rows)
        elif self.data is not None and self.data.suffix and not self.data.exists():
            raise ConfigError(f"there is no file {self.data}; --data takes rows as in data/README.md")

    def load(self) -> Task:
        """Rows and prompts."""
        if self.benchmark is None:
            assert self.data is not None
            return data_task(self.data, self.preset)
        return load_task(self.benchmark, self.preset, self.profile, self.source, self.split)

    def described(self) -> dict[str, Any]:
        """What else must be known to score the samples again."""
        return {
            "preset": self.preset_name,
            "profile": self.profile,
            "n": self.preset.n,
            "limit": self.preset.limit,
            "source": None if self.source is None else str(self.source.resolve()),
            "split": self.split,
            "data": None if self.data is None else str(self.data.resolve()),
        }


class Answerer:
    """A model, in this process or behind servers, and how it is asked.  A context manager."""

    def __init__(
        self,
        model: ModelConfig,
        world: World,
        server: RolloutServerConfig | None = None,
        batch: int = 64,
        seed: int = 0,
        fresh: bool = False,
        stop_reason: Callable[[], str] = lambda: "",
    ) -> None:
        """``stop_reason``: asked whenever answers are done; "" = go on."""
        self.model, self.world, self.server = model, world, server
        self.batch, self.seed, self.fresh, self.stop_reason = batch, seed, fresh, stop_reason
        self.report = ""
        """What answers, for people."""
        self._stack = ExitStack()
        self._engine: Engine
        self._processor: VLMProcessor
        self._served: str | None = None
        """What servers call the model that they have."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            try:
                if self.server is None:
                    self._load()
                else:
                    self._connect(stack)
            except ProcessorError as error:
                raise ConfigError(str(error)) from error
            except OSError as error:  # what transformers raises for a name or folder that it cannot load
                reason = " ".join(str(error).split())[:300]
                raise ConfigError(
                    f"the model '{self.model.model}' cannot be loaded: {reason}\n"
                    "Give a folder in the Hugging Face form, or the id of a model on the hub: --model MODEL"
                ) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _load(self) -> None:
        from uniopd_mm.engines import LocalEngine
        from uniopd_mm.models import load_model

        model = load_model(self.model, self.world.device)
        self._processor = model.processor
        self._engine = LocalEngine(model, self.batch * ROUND)
        self.report = f"{self.model.model} on {self.world.device.type}, {self.model.dtype}"

    def _connect(self, stack: ExitStack) -> None:
        from uniopd_mm.engines import ServerEngine
        from uniopd_mm.models import load_processor

        assert self.server is not None
        self._processor = load_processor(self.model)
        engine = stack.enter_context(ServerEngine(self.server, self._processor, where="--server"))
        engine.connect()
        self._engine, self._served = engine, engine.model
        self.report = f"{self.model.model}: {engine.report}"

    def parts(self) -> tuple[Engine, VLMProcessor]:
        """The engine and the processor, for others who ask."""
        return self._engine, self._processor

    def settings(self, preset: Preset) -> dict[str, Any]:
        """What of the model changes the samples."""
        return {
            "model": model_identity(self.model),
            "dtype": self.model.dtype if self.server is None else None,
            "engine": "local" if self.server is None else self.server.kind,
            "served": self._served,
            "min_pixels": self.model.min_pixels,
            "max_pixels": self.model.max_pixels,
            "template": {**preset.template, **self.model.template},
            "seed": self.seed if preset.sampling.temperature else None,
        }

    def answer(self, task: Task, request: Request) -> tuple[dict[str, Any], list[Sample]]:
        """All samples of the task, in the order of its prompts, on every rank; and the settings they are kept by."""
        context, longest = self._engine.context, task.preset.sampling.max_new_tokens
        is_full = context is not None and longest >= context
        settings = {
            **self.settings(task.preset),
            **task.sample_settings(),
            "context": context if is_full else None,
        }
        root, ids = request.folder / "state", [prompt.id for prompt in task.prompts]
        if self.fresh and self.world.is_main:
            set_aside(root, settings)
        self.world.barrier()
        with SampleStore(root, settings, self.world.rank, task.digests) as store:
            if self.world.is_main:
                if is_full:
                    more = "; for more, start the server with room for it" if self.server else ""
                    print(
                        f"  prompt and answer may have {context} tokens together, what is not done by then is cut off{more}"
                    )
                self._say_known(store, task, ids)
            with ProgressLine(task.name, shown=self.world.is_main) as progress:

                def show(done: int, total: int) -> None:
                    reason = self.stop_reason()
                    if reason:
                        raise UniOPDError(f"stopped ({reason}); the same command goes on from here")
                    progress(done, total)

                generate(
                    self._engine,
                    self._processor.with_template(task.preset.template),
                    task.name,
                    task.prompts,
                    task.preset.n,
                    task.preset.sampling,
                    self.seed,
                    store,
                    self.world,
                    batch=self.batch if self.server is None else max(self.batch, SERVER_BATCH),
                    progress=show,
                )
            return settings, store.samples(task.name, ids, task.preset.n)

    def _say_known(self, store: SampleStore, task: Task, ids: Sequence[str]) -> None:
        total = len(ids) * task.preset.n
        known = total - sum(map(len, store.missing(task.name, ids, task.preset.n).values()))
        if known:
            print(f"  {known} of {total} answers are there already; --fresh makes them again")
        for hash, settings in store.others().items():
            lines = different(settings, store.settings)
            print(
                f"  answers with other settings stay in {store.root / hash}, unused: {'; '.join(lines[:3])}"
            )


def set_aside(root: Path, settings: Mapping[str, Any]) -> None:
    """Rename the folder of these settings, so that a run starts anew and nothing is lost."""
    from uniopd_mm.evaluation.samples import settings_hash

    folder = root / settings_hash(settings)
    if folder.exists():
        number = next(k for k in range(1, 10**6) if not (root / f"{folder.name}.old{k}").exists())
        folder.rename(root / f"{folder.name}.old{number}")


def check_golds(task: Task, verifiers: VerifierPool, world: World) -> list[str]:
    """``id: why`` of rows whose gold answer the verifiers cannot use, which will be unknown; DataError for more than 1 %."""
    mine = task.prompts[world.rank :: world.size]
    with world.together(UniOPDError):
        whys = zip(mine, verifiers.check_golds(mine), strict=True)
        found = [f"{prompt.source or prompt.id}: {why}" for prompt, why in whys if why]
    found = world.gather(found)
    require_few(found, len(task.prompts), f"gold answers of {task.name}")
    return found


def score_task(task: Task, samples: Sequence[Sample], verifiers: VerifierPool, world: World) -> list[Scored]:
    """Outcomes of all samples, on every rank; the ranks share the work."""
    known = {prompt.id for prompt in task.prompts}
    n_given = len(samples)
    samples = [sample for sample in samples if sample.id in known]
    if not samples:
        raise ConfigError(
            f"no sample of {task.name} belongs to a row that is evaluated. Other --limit or --split?"
        )
    if len(samples) < n_given and world.is_main:
        print(
            f"  {n_given - len(samples)} of {n_given} answers belong to none of these rows and are not scored"
        )
    mine = world.share(len(samples))
    with (
        world.together(UniOPDError),
        ProgressLine(f"{task.name}: scoring", shown=world.is_main) as progress,
    ):
        outcomes = score(task.prompts, samples[mine.start : mine.stop], verifiers, progress)
    return [Scored(s, o) for s, o in zip(samples, world.gather(outcomes), strict=True)]


def write_found(
    task: Task,
    request: Request,
    settings: Mapping[str, Any],
    scored: Sequence[Scored],
    verifiers: VerifierPool,
    about: Sequence[str],
) -> dict[str, Any]:
    """Write everything about one benchmark and return its numbers."""
    names = [verifiers.name_of(prompt) for prompt in task.prompts]
    result = summarise_benchmark(task.benchmark, task.rows, task.prompts, scored)
    result["verifiers"] = sorted(set(names))
    result["left_out"] = len(task.left_out)
    sampled = (settings.get("sampled") or {}).get("sampling") or {}
    longest = sampled.get("max_new_tokens", 0)
    full = sum(one.sample.finish == "length" and one.sample.n_tokens < longest for one in scored)
    if full:
        result["notes"].append(
            f"cut off before {longest} tokens, where prompt and answer filled the context: {full} of {len(scored)} answers"
        )
    write_task(request.folder, task, settings, scored, names)
    write_page(request.folder / "samples.html", task, result, scored, about)
    return result
