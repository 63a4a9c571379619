#!/usr/bin/env python
"""Evaluate a model on the paper's sixteen benchmarks, or on rows of one's own.

  python eval/run.py --model Qwen/Qwen3-VL-4B-Instruct --tasks chartqa,docvqa,aime25
  python eval/run.py --model runs/quickstart/model --tasks quickstart --dtype float32   # offline
  python eval/run.py --model FOLDER --tasks all --preset quick             # a first look at all
  python eval/run.py --model FOLDER --tasks image_math --source DOWNLOADED # files, not the hub
  python eval/run.py --model FOLDER --data rows.jsonl                      # rows of your own
  deepspeed eval/run.py --model FOLDER --tasks all                         # all GPUs of the machine
  python eval/run.py --model FOLDER --tasks code --server http://localhost:8000    # weights in vLLM
  python eval/run.py --score-only runs/eval/NAME --profile upstream        # again, without a model
  python eval/run.py --compare runs/eval/BEFORE runs/eval/AFTER            # paired comparison
  python eval/run.py --list                                                # what can be evaluated

The same command goes on where it was stopped.  Answers are kept with all settings that shape them
and are never mixed with others.  Written to --out: results.json, and per benchmark samples.jsonl,
scores.jsonl and samples.html.  eval/README.md explains benchmarks, profiles and numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(
    1, str(ROOT)
)  # a checkout works without installation; `benchmarks` is the folder beside this file

from uniopd_mm.config import JudgeConfig, ModelConfig, RolloutServerConfig, SandboxConfig, VerifierConfig
from uniopd_mm.errors import ConfigError, UniOPDError
from uniopd_mm.settings import from_options
from uniopd_mm.training.arguments import at_least
from uniopd_mm.training.launch import StopRequest, error_message, is_launched, prepare_environment

if TYPE_CHECKING:
    from uniopd_mm.distributed import World
    from uniopd_mm.evaluation.session import Answerer, Request
    from uniopd_mm.evaluation.tasks import Task
    from uniopd_mm.verifiers import VerifierPool

SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens")


def main() -> int:
    args = parse_args()
    if args.list:
        return list_benchmarks()
    if args.compare:
        return compare(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if is_launched(args.local_rank):
        prepare_environment()

    from uniopd_mm.distributed import close_world
    from uniopd_mm.evaluation.folder import require_writable
    from uniopd_mm.evaluation.references import require_published
    from uniopd_mm.evaluation.samples import read_samples
    from uniopd_mm.evaluation.session import check_golds, score_task, write_found
    from uniopd_mm.verifiers import VerifierPool

    requests = plan_scoring(args) if args.score_only else plan(args)
    require_writable(out_folder(args))
    if args.reference:
        require_published(ROOT / "eval" / "reference.yaml", args.reference)
    world = start_world(args)
    if not (world.is_main and sys.stderr.isatty()):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        verifiers = stack.enter_context(VerifierPool(verifier_config(args, requests, world)))
        answerer = None if args.score_only else stack.enter_context(make_answerer(args, world))
        say(world, f"{answerer.report if answerer else 'scoring alone'}   out {out_folder(args)}")
        for request in requests:
            task = request.load()
            say(world, "\n".join(describe(task, request)))
            if request.benchmark is None and runs_code(task, verifiers):
                say_sandbox(world)
            for problem in check_golds(task, verifiers, world):
                say(world, f"  unusable gold answer, counted as unknown: {problem}")
            if answerer is None:
                assert request.saved is not None
                sampled, samples = saved_settings(request), read_samples(request.saved)
            else:
                sampled, samples = answerer.answer(task, request)
            scored = score_task(task, samples, verifiers, world)
            if world.is_main:
                settings = {"sampled": sampled, "run": request.described()}
                about = [f"model {(sampled.get('model') or {}).get('path', '?')}", *describe(task, request)]
                results[task.name] = write_found(task, request, settings, scored, verifiers, about)
    if world.is_main:
        finish(args, results)
    close_world()
    return 0


def plan(args: argparse.Namespace) -> list[Request]:
    """What --tasks and --data ask for, each with its settings; a first row of every benchmark is read."""
    from tasks import get_benchmark, task_names

    from uniopd_mm.evaluation.benchmark import Preset
    from uniopd_mm.evaluation.session import Request
    from uniopd_mm.evaluation.tasks import changed_preset, choose_preset

    changes = {name: getattr(args, name) for name in ("n", "limit", *SAMPLING)}
    out, requests = out_folder(args), []
    for name in task_names(args.tasks):
        benchmark = get_benchmark(name)
        preset = choose_preset(benchmark, args.preset, changes)
        requests.append(
            Request(
                name=name,
                preset=preset,
                folder=out / name,
                benchmark=benchmark,
                preset_name=args.preset,
                profile=args.profile,
                source=args.source,
                split=args.split,
            )
        )
    for path in args.data:
        preset = changed_preset(Preset(default_sampling()), changes)
        requests.append(Request(path.stem, preset, out / path.stem, data=path, profile=args.profile))
    if not requests:
        raise ConfigError("nothing to evaluate: give --tasks NAMES (see --list) or --data FILE")
    names = [request.name for request in requests]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two of {', '.join(names)} have the same name, and so the same folder. Rename a file."
        )
    for request in requests:
        request.check()
    return requests


def plan_scoring(args: argparse.Namespace) -> list[Request]:
    """The saved samples to score again, with the settings they were made with."""
    from tasks import get_benchmark

    from uniopd_mm.evaluation.benchmark import Preset
    from uniopd_mm.evaluation.folder import read_settings
    from uniopd_mm.evaluation.samples import read_samples
    from uniopd_mm.evaluation.session import Request
    from uniopd_mm.evaluation.tasks import changed_preset, choose_preset

    path = args.score_only
    files = [path] if path.is_file() else sorted(path.glob("*/samples.jsonl"))
    if not files:
        raise ConfigError(
            f"{path} is no samples.jsonl, nor a folder of an evaluation that holds NAME/samples.jsonl"
        )
    out, requests = out_folder(args), []
    for file in files:
        saved = read_settings(file.parent) or {}
        run, sampling = saved.get("run", {}), saved.get("sampled", {}).get("sampling", {})
        names = sorted({sample.benchmark for sample in read_samples(file)})
        if len(names) != 1:
            raise ConfigError(
                f"{file} holds samples of {', '.join(names) or 'nothing'}; expected one benchmark"
            )
        name, data = names[0], args.data[0] if args.data else run.get("data") and Path(run["data"])
        changes = {**sampling, "limit": args.limit or run.get("limit"), "n": run.get("n")}
        preset_name = run.get("preset", args.preset)
        benchmark = None if data else get_benchmark(name)
        preset = (
            choose_preset(benchmark, preset_name, changes)
            if benchmark
            else changed_preset(Preset(default_sampling()), changes)
        )
        source = args.source or (run.get("source") and Path(run["source"]))
        requests.append(
            Request(
                name=name,
                preset=preset,
                folder=out / name,
                benchmark=benchmark,
                data=data or None,
                preset_name=preset_name,
                profile=args.profile,
                source=source or None,
                split=args.split or run.get("split"),
                saved=file,
            )
        )
    return requests


def saved_settings(request: Request) -> dict[str, Any]:
    """How samples were made that are scored again; empty where it is not known."""
    from uniopd_mm.evaluation.folder import read_settings

    assert request.saved is not None
    return (read_settings(request.saved.parent) or {}).get("sampled", {})


def make_answerer(args: argparse.Namespace, world: World) -> Answerer:
    """The model, or the servers that have it."""
    from uniopd_mm.evaluation.session import Answerer

    model = from_options(
        ModelConfig,
        model=args.model,
        revision=args.revision,
        dtype=args.dtype,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        template=args.template,
    )
    server = None
    if args.server:
        server = from_options(
            RolloutServerConfig,
            "--server-",
            kind=args.server_kind,
            urls=args.server,
            model=args.server_model,
            api_key_env=args.server_api_key_env,
            timeout_s=args.server_timeout_s,
            max_failed_share=args.server_max_failed_share,
            sync="never",
        )
    stop = StopRequest() if is_launched(args.local_rank) else None  # killed, it leaves its ranks running
    return Answerer(
        model, world, server, args.batch, args.seed, args.fresh, lambda: stop.reason if stop else ""
    )


def verifier_config(args: argparse.Namespace, requests: Sequence[Request], world: World) -> VerifierConfig:
    """Scoring settings; verifiers that need processes share the cores of the machine.

    Naming the verifier of code here makes a machine that cannot run programs safely an error at the start.
    """
    judge = None
    if args.verifier == "judge" and not args.judge:
        raise ConfigError("--verifier judge needs a model that judges. Type --judge URL")
    if args.judge:
        if not args.judge.startswith(("http://", "https://")):
            raise ConfigError(f"--judge {args.judge}: a judge has a URL like http://10.0.0.5:8000")
        judge = from_options(
            JudgeConfig,
            "--judge-",
            url=args.judge,
            model=args.judge_model,
            api_key_env=args.judge_api_key_env,
        )
    has_code = any(request.benchmark and request.benchmark.domain == "code" for request in requests)
    if has_code:
        say_sandbox(world)
    return VerifierConfig(
        default=args.verifier,
        by_domain={"code": "code"} if has_code else {},
        workers=max(1, (os.cpu_count() or 1) // world.size),
        judge=judge,
        sandbox=SandboxConfig(allow_unsafe=args.allow_unsafe_code),
    )


def runs_code(task: Task, verifiers: VerifierPool) -> bool:
    """Whether rows of one's own have programs for answers."""
    return any(verifiers.name_of(prompt).partition(":")[0] == "code" for prompt in task.prompts)


def say_sandbox(world: World) -> None:
    from uniopd_mm.sandbox import describe as describe_sandbox

    say(world, describe_sandbox())


def start_world(args: argparse.Namespace) -> World:
    import torch

    from uniopd_mm.distributed import World, init_world

    if is_launched(args.local_rank):
        return init_world(timeout_s=7200.0)  # one rank may be busy with long answers while the others wait
    return World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def describe(task: Any, request: Request) -> list[str]:
    """One benchmark in a line or two: how many rows, asked how, scored how."""
    sampling = task.preset.sampling
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    how += f", top-p {sampling.top_p:g}" if sampling.top_p < 1 else ""
    how += f", top-k {sampling.top_k}" if sampling.top_k else ""
    preset = f"preset {request.preset_name}, " if request.benchmark else ""
    lines = [
        f"{task.benchmark.title}: {len(task.rows)} rows x {task.preset.n}, {preset}{how}, up to "
        f"{sampling.max_new_tokens} tokens, profile {request.profile}"
    ]
    if task.left_out:
        lines.append(f"  {len(task.left_out)} rows left out, the first: {task.left_out[0]}")
    return lines


def finish(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Print the table and write results.json."""
    from tasks import GROUPS

    from uniopd_mm.evaluation.folder import write_results
    from uniopd_mm.evaluation.references import reference_text
    from uniopd_mm.evaluation.results import means
    from uniopd_mm.evaluation.tables import result_table

    out, averages = out_folder(args), means(results)
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if value
    }
    settings["data"] = list(map(str, args.data))
    write_results(out, settings, results, averages)
    print()
    print(result_table(results, averages))
    for name, result in results.items():
        for note in result["notes"]:
            print(f"{name}: {note}")
        reasons = result["unknown_reasons"]
        for reason, count in reasons.items():
            print(f"{name}: {count} unknown: {reason}")
        n_more = round((result["unknown"] or 0) * result["samples"]) - sum(reasons.values())
        if n_more:
            print(f"{name}: {n_more} unknown for other reasons; all are in {name}/scores.jsonl")
    whole = {name: mean for name, mean in averages.items() if set(GROUPS.get(name, "?")) <= results.keys()}
    published = reference_text(ROOT / "eval" / "reference.yaml", args.reference or args.model, results, whole)
    if published:
        print(f"\n{published}")
    print(
        f"\n{out / 'results.json'}; answers to look at: {out}/{'*' if len(results) > 1 else next(iter(results))}/samples.html"
    )


def compare(args: argparse.Namespace) -> int:
    """Two runs, benchmark by benchmark, on the rows that both have."""
    from uniopd_mm.evaluation.comparing import compare_runs
    from uniopd_mm.evaluation.tables import comparison_table

    found = compare_runs(*args.compare, force=args.force)
    print(f"first   {args.compare[0]}\nsecond  {args.compare[1]}\n")
    print(
        comparison_table(
            {name: one.difference for name, one in found.items()},
            {name: (one.first, one.second) for name, one in found.items()},
        )
    )
    for name, one in found.items():
        if one.only_first or one.only_second:
            print(
                f"{name}: {one.only_first} rows are only in the first run, {one.only_second} only in the second"
            )
        if one.unknown_first or one.unknown_second:
            print(
                f"{name}: unknown, and so counted as wrong: {one.unknown_first} answers of the first run, "
                f"{one.unknown_second} of the second"
            )
    return 0


def list_benchmarks() -> int:
    """Names, titles and sizes."""
    from tasks import GROUPS, benchmark_names, get_benchmark

    from uniopd_mm.evaluation.tables import align

    lines = [["name", "title", "rows", "domain", "metric", "samples (paper, quick)"]]
    for name in benchmark_names():
        one = get_benchmark(name)
        asked = ", ".join(str(one.presets[preset].n) for preset in ("paper", "quick"))
        lines.append([name, one.title, str(one.n_rows or "?"), one.domain, one.metric, asked])
    print(align(lines, left=6))
    print("groups: " + ", ".join(GROUPS))
    return 0


def out_folder(args: argparse.Namespace) -> Path:
    if args.out:
        return args.out
    if args.score_only:
        folder = args.score_only if args.score_only.is_dir() else args.score_only.parent.parent
        return folder / f"profile_{args.profile}"
    return Path("runs/eval") / (Path(args.model.rstrip("/")).name or "model")


def default_sampling() -> Any:
    from uniopd_mm.config import EvalSamplingConfig

    return EvalSamplingConfig()


def template_value(text: str) -> tuple[str, Any]:
    """``enable_thinking=false`` -> a variable of the chat template; what JSON has no word for (a date) stays text."""
    import yaml

    name, equals, written = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--template {text}: expected NAME=VALUE, e.g. --template enable_thinking=false")
    try:
        value = yaml.safe_load(written)
        json.dumps(value, allow_nan=False)
    except (yaml.YAMLError, TypeError, ValueError):
        value = written
    return name, value


def say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="eval/run.py [options]",
    )
    what = parser.add_argument_group("what")
    what.add_argument("--model", help="Hugging Face folder or hub id")
    what.add_argument("--tasks", default="", help="benchmarks and groups, comma-separated; --list names them")
    what.add_argument(
        "--data", type=Path, action="append", default=[], help="rows of your own (JSONL, Parquet, YAML)"
    )
    what.add_argument(
        "--source",
        type=Path,
        help="folder with the public files, one sub-folder per benchmark; default: the hub",
    )
    what.add_argument("--split", help="another split than the benchmark's own")
    what.add_argument("--limit", type=at_least(1), help="only the first rows")
    what.add_argument("--list", action="store_true", help="list benchmarks and groups")
    how = parser.add_argument_group("how to ask")
    how.add_argument(
        "--preset",
        default="paper",
        help="paper = the published protocol (default); quick = fewer rows, shorter answers; own = the words of the "
        "benchmark's authors (code)",
    )
    how.add_argument(
        "--samples",
        "--n",
        dest="n",
        type=at_least(1),
        help="per row; default: the preset's (behind the deepspeed command only --samples: it takes --n for its own)",
    )
    how.add_argument(
        "--temperature", type=float, help="0 = greedy; default: the preset's, as for the next three"
    )
    how.add_argument("--top-p", type=float)
    how.add_argument("--top-k", type=int)
    how.add_argument("--max-new-tokens", type=at_least(1))
    how.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="variable of the chat template, e.g. enable_thinking=false",
    )
    how.add_argument("--min-pixels", type=at_least(1), help="smallest image area after resizing")
    how.add_argument("--max-pixels", type=at_least(1), help="largest image area after resizing")
    how.add_argument("--seed", type=at_least(0), default=0, help="of answers that are sampled")
    score = parser.add_argument_group("how to score")
    score.add_argument(
        "--profile",
        choices=["strict", "upstream"],
        default="strict",
        help="strict = right where upstream is wrong (default); upstream = the number of the benchmark's own code",
    )
    score.add_argument(
        "--verifier", default="math", help="for rows of --data that name none (default %(default)s)"
    )
    score.add_argument(
        "--judge",
        metavar="URL",
        help="OpenAI-compatible server of a judge, for rows of --data with verifier: judge (or with --verifier judge)",
    )
    score.add_argument("--judge-model", help="its model; default: the only one it serves")
    score.add_argument("--judge-api-key-env", metavar="NAME", help="environment variable with its API key")
    score.add_argument(
        "--allow-unsafe-code",
        action="store_true",
        help="run programs of the model also where the machine cannot isolate them",
    )
    score.add_argument(
        "--score-only",
        type=Path,
        metavar="SAMPLES",
        help="samples.jsonl or the folder of a run: score again, without a model",
    )
    score.add_argument(
        "--reference",
        metavar="MODEL",
        help="published model to print beside the result; default: by the name of --model",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--out", type=Path, help="folder of the run; default: runs/eval/NAME OF THE MODEL")
    where.add_argument(
        "--fresh", action="store_true", help="answer again; old answers are set aside, not deleted"
    )
    where.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="default %(default)s"
    )
    where.add_argument("--revision", help="of a hub id")
    where.add_argument(
        "--batch", type=at_least(1), default=64, help="prompts answered together (default %(default)s)"
    )
    where.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="URL",
        help="server that has the weights (again for more); --model is then its tokenizer and processor",
    )
    where.add_argument(
        "--server-kind",
        choices=["vllm", "vllm_text", "sglang", "openai"],
        default="vllm",
        help="default %(default)s; vllm and sglang take images",
    )
    where.add_argument("--server-model", help="name under which it serves the model; default: the only one")
    where.add_argument(
        "--server-timeout-s", type=float, default=1800.0, help="seconds for one request (default %(default)s)"
    )
    where.add_argument(
        "--server-max-failed-share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the answers asked for together; past it the run stops (default %(default)s)",
    )
    where.add_argument(
        "--server-api-key-env", metavar="NAME", help="environment variable with the servers' API key"
    )
    where.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    two = parser.add_argument_group("two runs")
    two.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="folders of two runs: paired difference, interval, p",
    )
    two.add_argument("--force", action="store_true", help="compare runs with different settings")
    args = parser.parse_args(argv)
    if not (args.model or args.list or args.compare or args.score_only):
        raise ConfigError("which model? Give --model FOLDER (or a hub id); --help shows examples")
    args.template = dict(map(template_value, args.template))
    return args


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except UniOPDError as error:
        sys.exit(error_message(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what is left to flush has nowhere to go
        sys.exit(1)
