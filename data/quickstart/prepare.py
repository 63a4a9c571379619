"""Make the quickstart from nothing: data rows, a tokenizer, two teachers and a half-trained student, all offline; then
balance the rows by how difficult they are for that student.

    python data/quickstart/prepare.py --out quickstart

Finished parts are kept: a second call with the same settings returns at once, and one that was killed half-way goes on
with the parts that were not finished.  See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from supervised import Schedule
from task import DOMAINS, draw_strips, picture, rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CODE = ("task.py", "tiny_models.py", "supervised.py", "prepare.py", "../../uniopd_mm/prompts/manifest.py")
"""Files whose content decides the result: a changed one makes the kept parts stale."""
TEACHERS = {"teacher_vlm": "read", "teacher_text": "arithmetic"}
"""Teacher -> the domain it serves; both are trained on all questions."""
REPORT_EVERY_S = 10.0


class PrepareError(RuntimeError):
    """The quickstart could not be made; the message says what to type."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is made: perhaps its tower first, then the whole of it."""

    offset: int
    """Times 1000, added to the seed, so that no two models start alike."""
    sees: bool
    """A LLaVA on a copy of the text teacher's weights; else the text teacher itself."""
    digits: Schedule | None = None
    """Teaching the fresh tower to name single digits, before it is joined to the language model."""
    questions: Schedule
    """Training on questions and their chains."""

    def stages(self) -> dict[str, Schedule]:
        """Stage name -> schedule, in order."""
        return {**({"digits": self.digits} if self.digits else {}), "questions": self.questions}


RECIPES: dict[str, Recipe] = {
    "teacher_text": Recipe(offset=1, sees=False, questions=Schedule(steps=500, peak_lr=6e-3)),
    "teacher_vlm": Recipe(
        offset=2,
        sees=True,
        digits=Schedule(steps=700, batch=128),
        questions=Schedule(steps=200, peak_lr=2e-3, tower_lr_ratio=0.3, warmup=20),
    ),
    # Half-trained on purpose: it has seen only the first twenty scans, two of each digit, and no variation of them.
    "student": Recipe(offset=3, sees=True, questions=Schedule(steps=120, n_scans=20, warp=0.0)),
}
"""In an order in which each can be made from those before it."""
STAGE_CPU_S = {"digits": 0.03, "questions": 0.09}
"""CPU seconds per step on one core of a 2.6 GHz server: to guess the remaining time."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the result."""

    seed: int
    train_rows: int
    eval_rows: int
    steps_scale: float
    samples: int = 4
    """Answers of the student to a training row, by which rows are balanced; 0 = they are not."""
    asked_rows: int = 3000
    """Training rows that it answers; the others stay in once."""

    def digest(self) -> str:
        """Short hash of the settings, the recipes and the code that follows them."""
        parts = [json.dumps(asdict(self), sort_keys=True)]
        parts += [(HERE / name).read_text() for name in CODE]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


class Workshop:
    """The output folder: parts are made aside, then moved into place, then stamped with the settings' hash."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self.digest = digest
        self.aside = folder / ".unfinished"
        self.stamps = folder / ".finished"

    def result(self, part: str) -> dict[str, Any] | None:
        """What was noted of a finished part of these settings; None if it has to be made."""
        return self._read(self.stamps / f"{part}.json")

    def manifest(self) -> dict[str, Any] | None:
        return self._read(self.folder / "manifest.json")

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        noted = json.loads(path.read_text())
        return noted if noted.get("settings_hash") == self.digest else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder against a second preparation at the same time; sweep what a killed one left behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PrepareError(
                    f"another preparation is at work in {self.folder}; wait for it, or choose another --out."
                ) from None
            shutil.rmtree(self.aside, ignore_errors=True)
            self.stamps.mkdir(exist_ok=True)
            yield
            shutil.rmtree(self.aside, ignore_errors=True)

    def begin(self, part: str) -> Path:
        """An empty folder aside to make ``part`` in; the stamp of an older one goes."""
        (self.stamps / f"{part}.json").unlink(missing_ok=True)
        (self.folder / "manifest.json").unlink(missing_ok=True)
        folder = self.aside / part
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def finish(self, part: str, places: dict[str, str], noted: dict[str, Any]) -> None:
        """Move ``places`` (name aside -> name in the folder) into place and stamp the part."""
        for source, target in places.items():
            place = self.folder / target
            if place.is_dir():
                shutil.rmtree(place)
            os.replace(self.aside / part / source, place)
        self.write(self.stamps / f"{part}.json", noted)

    def write(self, path: Path, noted: dict[str, Any]) -> None:
        aside = path.with_suffix(".json.tmp")
        aside.write_text(json.dumps({"settings_hash": self.digest, **noted}, indent=2) + "\n")
        os.replace(aside, path)


def import_for_measuring() -> None:
    """Slow imports, done while other processes train rather than after them."""
    be_quiet_and_offline()
    from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, Qwen3ForCausalLM  # noqa: F401


def be_quiet_and_offline() -> None:
    """Before transformers is first imported: no look at the hub, no warnings or progress bars of its own."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    # Transformers imports DeepSpeed where it is installed, which otherwise warns that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import transformers

    transformers.utils.logging.disable_progress_bar()


def scans_and_labels() -> tuple[Any, Any]:
    """The 1,797 bundled scans: ink [1797, 8, 8] in 0..16 and digits [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise PrepareError("scikit-learn brings the scans; type: pip install scikit-learn") from error
    bundle: Any = load_digits()
    return bundle.images, bundle.target


def make_data(workshop: Workshop, settings: Settings) -> None:
    """Pictures and rows of both splits."""
    from PIL import Image

    start = time.process_time()
    scans, labels = scans_and_labels()
    folder = workshop.begin("data")
    (folder / "images").mkdir()
    for split, n_rows in (("train", settings.train_rows), ("eval", settings.eval_rows)):
        strips = draw_strips(labels, split, n_rows, settings.seed)
        for strip in strips:
            Image.fromarray(picture(scans[list(strip.scans)])).save(folder / strip.name)
        lines = [json.dumps(row) + "\n" for row in rows(strips)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    names = ("images", "train.jsonl", "eval.jsonl")
    workshop.finish("data", {n: n for n in names}, {"cpu_s": round(time.process_time() - start, 1)})


def run_lane(names: Sequence[str], workshop: Workshop, settings: Settings, threads: int, news: Any) -> None:
    """In a process of its own: make the named models one after another; ``news`` gets (name, stage, steps, loss)."""
    # Read by the numerical libraries when they are first imported.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    be_quiet_and_offline()
    import torch

    torch.set_num_threads(threads)
    scans_and_digits = scans_and_labels()
    parent = multiprocessing.parent_process()

    def check_parent() -> None:
        if parent is not None and not parent.is_alive():
            raise SystemExit("the preparation was ended; what is not finished will be made anew")

    for name in names:

        def progress(stage: str, step: int, loss: float, name: str = name) -> None:
            check_parent()
            news.put((name, stage, step, loss))

        make_model(name, workshop, settings, scans_and_digits, progress, check_parent)


def make_model(
    name: str,
    workshop: Workshop,
    settings: Settings,
    scans_and_digits: tuple[Any, Any],
    progress: Callable[[str, int, float], None],
    check_parent: Callable[[], None],
) -> None:
    """Train one model in its stages and save it; one that sees waits for the text teacher to be finished."""
    import torch
    from supervised import Encoder, Lessons, load, teach_questions, teach_tower
    from tiny_models import VISION_TOKENS, build_language, build_tokenizer, build_tower, join, save_model

    recipe, start = RECIPES[name], time.process_time()
    seed = settings.seed + 1000 * recipe.offset
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    losses = {}

    def lessons(stage: str) -> Lessons:
        schedule = replace(recipe.stages()[stage], steps=n_steps(name, stage, settings))
        return Lessons(*scans_and_digits, schedule, seed)

    if recipe.sees:
        tower = build_tower()
        if recipe.digits:
            losses["digits"] = teach_tower(tower, lessons("digits"), partial(progress, "digits"))
        while workshop.result("teacher_text") is None:
            check_parent()
            time.sleep(0.2)
        model = join(load(workshop.folder / "teacher_text")[0], tower, tokenizer)
    else:
        model = build_language(tokenizer)
    encoder = Encoder(tokenizer, VISION_TOKENS if recipe.sees else 0)
    losses["questions"] = teach_questions(
        model, encoder, lessons("questions"), partial(progress, "questions")
    )
    save_model(model, tokenizer, workshop.begin(name))
    noted = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "last_loss_nats": losses,
        "cpu_s": round(time.process_time() - start, 1),
    }
    workshop.finish(name, {".": name}, noted)


def n_steps(name: str, stage: str, settings: Settings) -> int:
    return max(1, round(RECIPES[name].stages()[stage].steps * settings.steps_scale))


def share_out(names: Sequence[str], lanes: int) -> list[list[str]]:
    """Names into at most ``lanes`` lists, dealt in turn, each list in the order of ``RECIPES``.

    That order matters: a process that waited for a model it is itself to make later would wait for ever.
    """
    return [list(names[lane::lanes]) for lane in range(lanes) if names[lane::lanes]]


def make_models(
    names: Sequence[str], workshop: Workshop, settings: Settings, jobs: int, threads: int
) -> None:
    """Train the named models in ``jobs`` processes of ``threads`` threads, and the data rows meanwhile if missing."""
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    lanes = [
        context.Process(target=run_lane, args=(share, workshop, settings, threads, news), daemon=True)
        for share in share_out(names, jobs)
    ]
    for lane in lanes:
        lane.start()
    if workshop.result("data") is None:
        make_data(workshop, settings)
    import_for_measuring()
    watch(lanes, news, Progress(names, settings, jobs))
    broken = [lane for lane in lanes if lane.exitcode]
    if broken:
        raise PrepareError(
            f"a training process ended with exit code {broken[0].exitcode} (its own message is above); "
            "finished parts are kept, so type the same command again once the cause is gone."
        )


def watch(lanes: Sequence[Any], news: Any, progress: Progress) -> None:
    """Print progress until every lane has ended; end the others when one has failed."""
    last = time.monotonic()
    while any(lane.is_alive() for lane in lanes) and not any(lane.exitcode for lane in lanes):
        with contextlib.suppress(queue.Empty):
            progress.hear(*news.get(timeout=0.2))
        if time.monotonic() - last >= REPORT_EVERY_S:
            last = time.monotonic()
            print(progress.line(), flush=True)
    if any(lane.exitcode for lane in lanes):
        for lane in lanes:
            lane.terminate()
    for lane in lanes:
        lane.join()


class Progress:
    """What the training processes have told so far."""

    def __init__(self, names: Sequence[str], settings: Settings, jobs: int) -> None:
        self.jobs = jobs
        self.start = time.monotonic()
        self.total = {(n, stage): n_steps(n, stage, settings) for n in names for stage in RECIPES[n].stages()}
        self.done = dict.fromkeys(self.total, 0)
        self.losses: dict[tuple[str, str], float] = {}

    def hear(self, name: str, stage: str, step: int, loss: float) -> None:
        self.done[name, stage] = step
        self.losses[name, stage] = loss

    def line(self) -> str:
        """E.g. ``  teacher_text: questions 120/500 (loss 0.31)   student: not begun   12 % done, about 95 s left``."""
        told = [self.told(name) for name in dict.fromkeys(name for name, _ in self.total)]
        left = {key: self.total[key] - self.done[key] for key in self.total}
        share = 1 - self.longest_cpu_s(left) / self.longest_cpu_s(self.total)
        elapsed_s = time.monotonic() - self.start
        eta = f", about {elapsed_s * (1 - share) / share:.0f} s left" if share > 0.02 else ""
        return f"  {'   '.join(told)}   {100 * share:.0f} % done{eta}"

    def longest_cpu_s(self, steps: dict[tuple[str, str], int]) -> float:
        """Of these steps, what follows one upon another: those that see begin their questions after the text teacher."""
        cost = {key: n * STAGE_CPU_S[key[1]] for key, n in steps.items()}
        if self.jobs == 1:
            return sum(cost.values())
        before = [c for (name, stage), c in cost.items() if name == "teacher_text" or stage == "digits"]
        after = [c for (name, stage), c in cost.items() if name != "teacher_text" and stage == "questions"]
        return max(before, default=0.0) + max(after, default=0.0)

    def told(self, name: str) -> str:
        begun = [key for key in self.total if key[0] == name and self.done[key]]
        if not begun:
            return f"{name}: not begun"
        key = begun[-1]
        if self.done[key] < self.total[key]:
            return f"{name}: {key[1]} {self.done[key]}/{self.total[key]} (loss {self.losses[key]:.2f})"
        return f"{name}: done" if key[1] == "questions" else f"{name}: waits for teacher_text"


def make_measurements(workshop: Workshop, settings: Settings, threads: int) -> dict[str, Any]:
    """Held-out accuracies and gaps of the finished models."""
    be_quiet_and_offline()
    import torch
    from supervised import measure

    torch.set_num_threads(threads)
    return measure(workshop.folder, TEACHERS, settings.seed)


def balance_rows(workshop: Workshop, settings: Settings, threads: int) -> None:
    """Write difficulty/manifest.jsonl: the training rows, each as often as the student's answers to it suggest."""
    workshop.begin("difficulty")
    command = [sys.executable, str(ROOT / "scripts" / "balance_data.py")]
    command += [str(ROOT / "scripts" / "recipes" / "quickstart.yaml"), "student.model=student"]
    command += ["data.train=train.jsonl", "rollout.concurrent_rollouts=1024", f"seed={settings.seed}"]
    command += [
        f"--samples={settings.samples}",
        f"--limit={settings.asked_rows}",
        f"--out={workshop.folder / 'difficulty'}",
    ]
    start = time.monotonic()
    status = run_to_end(command, workshop.folder, {**os.environ, "OMP_NUM_THREADS": str(threads)})
    if status:
        raise PrepareError(
            f"balancing the training rows ended with exit code {status} (its own message is above); finished parts are "
            "kept, so type the same command again once the cause is gone."
        )
    workshop.finish("difficulty", {}, {"wall_s": round(time.monotonic() - start, 1)})


def run_to_end(command: Sequence[str], folder: Path, environment: dict[str, str]) -> int:
    """Exit status of a command, which is ended with this process if that is asked to end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with subprocess.Popen(command, cwd=folder, env=environment) as process:
            try:
                return process.wait()
            finally:
                process.terminate()
    finally:
        signal.signal(signal.SIGTERM, before)


def prepare(folder: Path, settings: Settings, jobs: int = 2, threads: int = 1) -> dict[str, Any]:
    """Make what is missing in ``folder`` and return the manifest."""
    workshop = Workshop(folder, settings.digest())
    if (manifest := workshop.manifest()) is not None:
        print(f"Quickstart: {folder} is ready (made earlier with the same settings).")
        return manifest
    start = time.monotonic()
    with workshop.alone():
        missing = [name for name in RECIPES if workshop.result(name) is None]
        print(
            "Quickstart: no model weights can be downloaded here, so three small ones (130,000 to 220,000 weights) are\n"
            "now trained from scratch, by ordinary supervised training on scikit-learn's bundled scans of handwritten\n"
            f"digits.  To do: {', '.join(missing) or 'measurements only'}; {jobs} process(es) of {threads} thread(s).\n"
            f"On two idle cores this takes two to three minutes, once: the result is kept in {folder}",
            flush=True,
        )
        make_models(missing, workshop, settings, jobs, threads)
        print("  measuring on held-out digits", flush=True)
        measured = make_measurements(workshop, settings, threads)
        if settings.samples and workshop.result("difficulty") is None:
            print("  asking the student, to balance the training rows by difficulty", flush=True)
            balance_rows(workshop, settings, threads)
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        workshop.write(
            folder / "manifest.json",
            {
                "settings": asdict(settings),
                "models": {name: {**(workshop.result(name) or {}), **measured[name]} for name in RECIPES},
                "serves": TEACHERS,
                "cpu_s": round(sum(u.ru_utime + u.ru_stime for u in usage), 1),
                "wall_s": round(time.monotonic() - start, 1),
                "versions": {
                    p: version(p) for p in ("torch", "transformers", "tokenizers", "scikit-learn", "numpy")
                },
            },
        )
    manifest = workshop.manifest()
    assert manifest is not None
    print(summary(manifest))
    return manifest


def summary(manifest: dict[str, Any]) -> str:
    """The accuracies as a small table."""
    lines = [f"Held-out accuracy, greedy (at temperature 1):   {'   '.join(f'{d:>15}' for d in DOMAINS)}"]
    for name, facts in manifest["models"].items():
        shares = [f"{facts['greedy'][d]:.2f} ({facts['sampled'][d]:.2f})" for d in DOMAINS]
        lines.append(
            f"  {name:<14} {facts['parameters']:>8,} weights {'':>18} {'   '.join(f'{s:>15}' for s in shares)}"
        )
    lines.append(f"Ready after {manifest['wall_s']:.0f} s ({manifest['cpu_s']:.0f} CPU seconds).")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make it in")
    parser.add_argument("--seed", type=int, default=0, help="data, initial weights and training (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default 1)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default 2)")
    parser.add_argument("--train-rows", type=int, default=8000, help="rows of train.jsonl (default 8000)")
    parser.add_argument("--eval-rows", type=int, default=400, help="rows of eval.jsonl (default 400)")
    parser.add_argument(
        "--steps-scale",
        type=float,
        default=1.0,
        help="fraction of the training steps; < 1 gives poor models soon",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=4,
        help="answers of the student to a training row, to balance the rows by difficulty; 0 = not (default 4)",
    )
    parser.add_argument(
        "--asked-rows", type=int, default=3000, help="training rows that it answers (default 3000)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    settings = Settings(
        seed=args.seed,
        train_rows=args.train_rows,
        eval_rows=args.eval_rows,
        steps_scale=args.steps_scale,
        samples=args.samples,
        asked_rows=args.asked_rows,
    )
    try:
        prepare(args.out.resolve(), settings, jobs=args.jobs, threads=args.threads)
    except PrepareError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
