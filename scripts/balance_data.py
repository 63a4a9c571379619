#!/usr/bin/env python
"""Balance training data by difficulty: repeat the prompts that the student solves sometimes.

    python    scripts/balance_data.py RECIPE --out FOLDER              one process
    deepspeed scripts/balance_data.py RECIPE --out FOLDER              all local devices
    deepspeed scripts/train_mm.py RECIPE data.train=FOLDER/manifest.jsonl

The recipe's student answers every prompt of data.train 8 times (temperature 1, top-p 0.95, top-k
50), and the recipe's verifiers check the answers: a prompt's pass count, 0 to 8, is its difficulty.
Where the histogram of pass counts is U-shaped (many prompts never solved, many always), the prompts
between are repeated, up to 5 times an epoch, until their bins hold 0.95 of the largest one; where it
falls from 0 to 8 (a mirrored J), all that are ever solved.  Nothing is filtered.  A prompt with an
answer whose outcome is unknown stays in once, and is counted apart.

FOLDER gets manifest.jsonl (rows, repeats and pass counts; no row or image is copied), histogram.png
and samples/, every answer as soon as it is there: the same command goes on where an earlier one was
stopped, and asks again for no answer that it has.  Where the recipe has a rollout.server, those
servers answer; they must serve the recipe's student.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without installation

from uniopd_mm.config import SamplingConfig, TrainConfig
from uniopd_mm.difficulty import (
    CAP,
    Kind,
    PassCount,
    Shape,
    bins,
    histogram,
    pass_counts,
    repeats,
    shape_of,
    upsampled,
)
from uniopd_mm.errors import ConfigError, UniOPDError
from uniopd_mm.settings import from_options, load_config
from uniopd_mm.training.arguments import at_least, recipe_parser
from uniopd_mm.training.launch import StopRequest, error_message, is_launched, prepare_environment

if TYPE_CHECKING:
    from uniopd_mm.distributed import World
    from uniopd_mm.engines import Engine
    from uniopd_mm.processors import VLMProcessor
    from uniopd_mm.prompts import PromptSet
    from uniopd_mm.rollout import Outcome

PROMPTS_AT_ONCE = 4096
"""Prompts in memory at a time; those of Parquet files bring their images along."""
SHAPES = {"u": "U-shaped", "mirrored_j": "a mirrored J", "neither": "neither U-shaped nor a mirrored J"}


@dataclass(frozen=True)
class Balanced:
    """What came of it, for the table and the picture."""

    n: int
    """Answers per prompt."""
    shape: Shape
    kind: Kind
    """What it was balanced as: the shape that was recognised, or asked for."""
    before: list[int]
    """Prompts with 0..n correct answers."""
    after: list[int]
    """The same in an epoch of the balanced mixture."""
    n_apart: int
    """Prompts asked, of whose answers at least one has an unknown outcome."""
    n_not_asked: int
    n_prompts: int


def main() -> int:
    args = parse_args()
    config = load_config(TrainConfig, args.recipe, args.overrides)
    require_student(config)
    sampling = sampling_of(args, config)
    prepare_environment()
    stop = StopRequest()
    import torch  # from here on
    from transformers.utils.logging import disable_progress_bar

    from uniopd_mm.distributed import World, close_world, init_world
    from uniopd_mm.evaluation.folder import require_writable
    from uniopd_mm.prompts import load_prompts
    from uniopd_mm.prompts.manifest import row_digests, write_manifest
    from uniopd_mm.teachers.pool import served_domains
    from uniopd_mm.verifiers import verifier_names

    require_writable(Path(args.out))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_one_of_many = is_launched(args.local_rank)
    world = init_world(config.distributed.timeout_s) if is_one_of_many else World(0, 1, 0, device)
    if not (world.is_main and sys.stderr.isatty()):
        disable_progress_bar()
    prompts = load_prompts(
        config.data.train,
        domains=served_domains(config.teachers),
        verifiers=verifier_names(),
        max_bad_share=config.data.max_bad_share,
        seed=config.seed,
        balanced=False,
    )
    digests = row_digests(prompts)
    chosen = choose(prompts, args.limit, config.seed)
    say(
        world,
        f"{len(prompts)} prompts, {len(chosen)} of them answered {args.samples} times by {config.student.model}",
    )
    outcomes = answer(config, args, sampling, prompts, chosen, digests, world, stop)
    require_known(outcomes, config.verifier.max_unknown_share)
    counts = count_entries(prompts, chosen, outcomes)
    result, times = balance(counts, args.samples, config.seed, args.shape)
    if world.is_main:
        about = {
            "student": config.student.model,
            "sampling": sampling.model_dump(mode="json"),
            "seed": config.seed,
            **asdict(result),
            "shape": result.shape.kind,
        }
        manifest = Path(args.out) / "manifest.jsonl"
        write_manifest(manifest, prompts, times, counts, digests, about)
        draw(result, Path(args.out) / "histogram.png")
        print("\n".join(table(result)))
        print(f"histogram  {Path(args.out) / 'histogram.png'}")
        print(f"train with: deepspeed scripts/train_mm.py {args.recipe} data.train={manifest}", flush=True)
    close_world()
    return 0


def sampling_of(args: argparse.Namespace, config: TrainConfig) -> SamplingConfig:
    """How the student is asked; ConfigError for what cannot be."""
    return from_options(
        SamplingConfig,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=config.rollout.max_new_tokens,
        stop_token_ids=config.rollout.stop_token_ids,
    )


def require_student(config: TrainConfig) -> None:
    """ConfigError when the recipe's ``prepare`` has not made the student yet."""
    if config.prepare and not Path(config.student.model).exists():
        raise ConfigError(
            f"there is no student in {config.student.model} yet; this recipe makes it with: {config.prepare}"
        )


def choose(prompts: PromptSet, limit: int | None, seed: int) -> list[int]:
    """Indices of the prompts to ask: every row once, whatever its weight; with ``limit`` a seeded random part."""
    first: dict[tuple[int, int], int] = {}
    for i, entry in enumerate(prompts.entries()):
        first.setdefault(entry, i)
    chosen = list(first.values())
    if limit is None or limit >= len(chosen):
        return chosen
    return sorted(random.Random(f"difficulty/{seed}").sample(chosen, limit))


def answer(
    config: TrainConfig,
    args: argparse.Namespace,
    sampling: SamplingConfig,
    prompts: PromptSet,
    chosen: Sequence[int],
    digests: Sequence[str],
    world: World,
    stop: StopRequest,
) -> list[list[Outcome]]:
    """Outcomes of the answers to the chosen prompts, on every rank; what is on disk is not asked again."""
    from uniopd_mm.evaluation.generate import generate, score
    from uniopd_mm.evaluation.modelid import model_identity
    from uniopd_mm.evaluation.progress import ProgressLine
    from uniopd_mm.evaluation.samples import SampleStore
    from uniopd_mm.verifiers import VerifierPool

    n, name = args.samples, "difficulty"
    identity = model_identity(config.student)
    settings = {
        "student": identity["digest"] or identity,  # a folder that was moved is the same student
        **config.student.model_dump(mode="json", include={"dtype", "template", "min_pixels", "max_pixels"}),
        "sampling": sampling.model_dump(mode="json"),
        "seed": config.seed,
        "engine": config.rollout.server.kind if config.rollout.server else "local",
    }
    outcomes: list[list[Outcome]] = []
    with ExitStack() as stack:
        engine, processor = open_engine(config, world, stack)
        verifiers = stack.enter_context(VerifierPool(config.verifier))
        store = stack.enter_context(SampleStore(Path(args.out) / "samples", settings, world.rank))
        progress = stack.enter_context(ProgressLine("difficulty", "prompts", shown=world.is_main))
        for start in range(0, len(chosen), PROMPTS_AT_ONCE):
            # Filed under their content: a row that was changed is asked again, one that only moved is not.
            some = [
                replace(prompts[i], id=f"{prompts[i].id}@{digests[i]}")
                for i in chosen[start : start + PROMPTS_AT_ONCE]
            ]
            batch = max(1, config.rollout.concurrent_rollouts // n)

            def show(done: int, to_do: int, start: int = start, n_here: int = len(some)) -> None:
                if stop.reason:
                    raise UniOPDError(f"stopped ({stop.reason}); the same command goes on")
                if to_do:
                    progress(start + n_here * done // to_do, len(chosen))

            generate(
                engine, processor, name, some, n, sampling, config.seed, store, world, batch, progress=show
            )
            mine = [some[k] for k in world.share(len(some))]
            samples = store.samples(name, [prompt.id for prompt in mine], n)
            scored = score(mine, samples, verifiers)
            outcomes += world.gather([scored[k * n : (k + 1) * n] for k in range(len(mine))])
    return outcomes


def open_engine(config: TrainConfig, world: World, stack: ExitStack) -> tuple[Engine, VLMProcessor]:
    """The recipe's student in this process, or the servers that the recipe names."""
    from uniopd_mm.engines import LocalEngine, ServerEngine
    from uniopd_mm.models import load_model
    from uniopd_mm.models.loading import load_processor

    if config.rollout.server is None:
        model = load_model(config.student, world.device)
        return LocalEngine(model, config.rollout.concurrent_rollouts), model.processor
    from transformers import AutoConfig

    processor = load_processor(config.student)
    text = AutoConfig.from_pretrained(
        config.student.model, revision=config.student.revision
    ).get_text_config()
    engine = stack.enter_context(ServerEngine(config.rollout.server, processor, text.vocab_size))
    with world.together(ConfigError):
        engine.connect()
    return engine, processor


def require_known(outcomes: Sequence[Sequence[Outcome]], limit: float) -> None:
    """UniOPDError when more than ``limit`` of the outcomes are unknown, with the most frequent reasons."""
    reasons = Counter(o.reason or "no reason given" for row in outcomes for o in row if o.correct is None)
    share = reasons.total() / max(1, sum(map(len, outcomes)))
    if share > limit:
        lines = [f"{share:.0%} of the outcomes are unknown, more than verifier.max_unknown_share={limit:g}:"]
        lines += [f"{count} x {reason[:200]}" for reason, count in reasons.most_common(3)]
        lines.append(
            "Mend the cause and type the same command again (the answers are kept), or raise the limit."
        )
        raise UniOPDError("\n  ".join(lines))


def count_entries(
    prompts: PromptSet, chosen: Sequence[int], outcomes: Sequence[Sequence[Outcome]]
) -> list[PassCount]:
    """The pass count of every prompt of the mixture; copies of a row share it."""
    entries = prompts.entries()
    found = pass_counts([[outcome.correct for outcome in row] for row in outcomes])
    by_row = {entries[i]: count for i, count in zip(chosen, found, strict=True)}
    return [by_row.get(entry, PassCount(0, 0, 0)) for entry in entries]


def balance(counts: Sequence[PassCount], n: int, seed: int, shape: Kind | None) -> tuple[Balanced, list[int]]:
    """What to show, and how often each prompt is in an epoch; ``shape`` replaces the recognised one."""
    binned = bins(counts, n)
    before = histogram(binned, n)
    found = shape_of(before)
    kind = shape or found.kind
    times = repeats(binned, kind, n, seed)
    n_not_asked = sum(count.n_asked == 0 for count in counts)
    return Balanced(
        n=n,
        shape=found,
        kind=kind,
        before=before,
        after=histogram(binned, n, times),
        n_apart=binned.count(None) - n_not_asked,
        n_not_asked=n_not_asked,
        n_prompts=len(counts),
    ), times


def table(result: Balanced) -> list[str]:
    """The histogram before and after, and what it was taken for."""
    n, shape = result.n, result.shape
    n_counted, n_after = sum(result.before), sum(result.after)
    n_once = result.n_prompts - n_counted
    lines = ["", "correct   prompts           in an epoch       repeats"]
    for count, (before, after) in enumerate(zip(result.before, result.after, strict=True)):
        mean = f"{after / before:9.2f}" if before else f"{'-':>9}"
        lines.append(
            f"{count:>2} of {n:<3}{before:9}{_share(before, n_counted)}{after:10}{_share(after, n_after)}{mean}"
        )
    for name, number in (("unknown", result.n_apart), ("not asked", result.n_not_asked)):
        if number:
            lines.append(f"{name:<9}{number:8}{'':8}{number:10}{'':8}{1:9.2f}")
    lines.append(f"{'all':<9}{result.n_prompts:8}{'':8}{n_after + n_once:10}")
    chosen = upsampled(result.kind, n)
    what = f"repeated: {chosen[0]}..{chosen[-1]}, at most {CAP} times" if chosen else "nothing is repeated"
    asked = "" if result.kind == shape.kind else f"as asked, balanced as {SHAPES[result.kind]}; "
    ends = f"bin 0 is {shape.low:.1f} and bin {n} is {shape.high:.1f} times the mean of those between"
    if not sum(result.before[1:-1]):
        ends = "nothing is between the ends"
    return [*lines, "", f"{SHAPES[shape.kind]}: {ends}, trend {shape.trend:+.2f}; {asked}{what}"]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:6.1f} %" if whole else " " * 8


def draw(result: Balanced, path: Path) -> None:
    """The histogram before and after as a PNG.  Needs the ``train`` extra."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the histogram needs matplotlib: pip install "uniopd-mm[train]"') from error
    from uniopd_mm.report.curves import COLOURS

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    series = (("as it was", result.before, COLOURS[0]), ("in an epoch, balanced", result.after, COLOURS[1]))
    for k, (label, sizes, colour) in enumerate(series):
        places = [count + 0.4 * (k - 0.5) for count in range(result.n + 1)]
        bars = axis.bar(places, sizes, width=0.38, color=colour, label=label)
        axis.bar_label(bars, fontsize=8, padding=1)
    axis.set_title(f"Difficulty: {SHAPES[result.shape.kind]}", loc="left")
    axis.set_xlabel(f"correct answers of {result.n}")
    axis.set_ylabel("prompts")
    axis.set_xticks(range(result.n + 1))
    axis.set_ylim(0, 1.12 * max(*result.before, *result.after, 1))
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    apart = [(result.n_apart, "with unknown outcomes"), (result.n_not_asked, "not asked")]
    title = ", ".join(f"{number} prompts {why}" for number, why in apart if number)
    axis.legend(frameon=False, loc="upper center", ncols=2, fontsize=9, title=title and f"not drawn: {title}")
    figure.savefig(path, dpi=110)


def say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


def parse_args() -> argparse.Namespace:
    parser = recipe_parser(__doc__)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for manifest, picture and answers")
    parser.add_argument(
        "--samples",
        type=at_least(2),
        default=8,
        metavar="N",
        help="answers per prompt (default %(default)s); more later go on from those there are",
    )
    parser.add_argument(
        "--limit",
        type=at_least(1),
        metavar="N",
        help="ask only so many prompts, chosen at random by the recipe's seed; the others stay in once",
    )
    parser.add_argument(
        "--shape",
        choices=("u", "mirrored_j"),
        help="repeat as for this shape, whatever the histogram looks like",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="default %(default)s")
    parser.add_argument("--top-p", type=float, default=0.95, help="default %(default)s")
    parser.add_argument("--top-k", type=int, default=50, help="default %(default)s")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UniOPDError as error:
        sys.exit(error_message(error))
