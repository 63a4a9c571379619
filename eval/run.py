#!/usr/bin/env python
"""Answer held-out prompts with a model and score the answers.

    python eval/run.py --model FOLDER --data rows.jsonl                any file in the row form of data/README.md
    python eval/run.py --model runs/quickstart/model --tasks quickstart
    deepspeed eval/run.py --model FOLDER --data rows.jsonl             the devices of the machine share the prompts

Prints a table and writes samples.jsonl and results.json to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without installation

from uniopd_mm.config import ModelConfig, SamplingConfig, VerifierConfig
from uniopd_mm.errors import ConfigError, UniOPDError
from uniopd_mm.training.launch import error_message, prepare_environment

TASKS = {"quickstart": "runs/quickstart-cache/eval.jsonl"}
"""Name -> rows; the quickstart's are written by its first run."""


def main() -> int:
    args = parse_args()
    prepare_environment()
    import torch

    from uniopd_mm.distributed import World, close_world, init_world
    from uniopd_mm.engines import LocalEngine
    from uniopd_mm.evaluation import evaluate, summarise, write_samples
    from uniopd_mm.models import load_model
    from uniopd_mm.prompts import load_prompts
    from uniopd_mm.verifiers import VerifierPool, verifier_names

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = init_world(1800.0) if args.local_rank is not None else World(0, 1, 0, device)
    model = load_model(
        ModelConfig(
            model=args.model, dtype=args.dtype, min_pixels=args.min_pixels, max_pixels=args.max_pixels
        ),
        world.device,
    )
    sampling = SamplingConfig(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_new_tokens=args.max_new_tokens
    )
    results = {}
    with VerifierPool(VerifierConfig(default=args.verifier)) as verifiers:
        for name, path in sources(args).items():
            prompts = load_prompts(str(path), verifiers=verifier_names())
            chosen = [prompts[i] for i in range(min(args.limit or len(prompts), len(prompts)))]
            samples = evaluate(
                LocalEngine(model, args.batch * args.n),
                model.processor,
                chosen,
                verifiers,
                sampling,
                world,
                n=args.n,
                batch=args.batch,
                seed=args.seed,
                progress=progress_line(name) if world.is_main else None,
            )
            results[name] = summarise(samples)
            if world.is_main:
                write_samples(Path(args.out) / name / "samples.jsonl", samples)
    if world.is_main:
        settings = {k: v for k, v in vars(args).items() if k != "local_rank"}
        text = json.dumps({"settings": settings, "results": results}, indent=2)
        (Path(args.out) / "results.json").write_text(text + "\n", encoding="utf-8")
        print_table(results)
        print(f"samples and results in {args.out}")
    close_world()
    return 0


def sources(args: argparse.Namespace) -> dict[str, Path]:
    """Name -> data file of everything to evaluate."""
    chosen = {Path(path).stem: Path(path) for path in args.data}
    for task in filter(None, args.tasks.split(",")):
        if task not in TASKS:
            raise ConfigError(f"unknown task '{task}'; known: {', '.join(TASKS)}. Own rows: --data FILE")
        chosen[task] = ROOT / TASKS[task]
        if not chosen[task].exists():
            raise ConfigError(f"{chosen[task]} is not there yet; make it with: make quickstart")
    if not chosen:
        raise ConfigError(f"nothing to evaluate: give --tasks ({', '.join(TASKS)}) or --data FILE")
    return chosen


def progress_line(name: str):
    """Prints (done, total) with the time left, on one line on a terminal."""
    import time

    started = time.monotonic()

    def show(done: int, total: int) -> None:
        left = (time.monotonic() - started) / done * (total - done)
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        print(f"{name}: {done}/{total} prompts, {left:.0f} s left  ", end=end, file=sys.stderr, flush=True)

    return show


def print_table(results: dict[str, dict[str, float]]) -> None:
    print(f"{'':24}{'accuracy':>10}{'n':>8}{'unknown':>10}{'no answer':>11}{'truncated':>11}{'tokens':>8}")
    for name, metrics in results.items():
        row = [
            metrics.get(f"eval/{key}", float("nan"))
            for key in ("unknown_share", "unparsed_share", "truncated_share")
        ]
        accuracy = metrics.get("eval/accuracy", float("nan"))
        shares = "".join(
            f"{100 * share:>{width - 2}.1f} %" for share, width in zip(row, (10, 11, 11), strict=True)
        )
        print(
            f"{name:24}{100 * accuracy:8.1f} %{metrics['eval/n']:8.0f}{shares}{metrics['eval/length']:8.1f}"
        )
        for key, value in sorted(metrics.items()):
            if key.count("/") == 2:
                print(f"  {key.split('/')[1]:22}{100 * value:8.1f} %")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--tasks", default="", help=f"comma-separated: {', '.join(TASKS)}")
    parser.add_argument(
        "--data", action="append", default=[], help="rows to evaluate (JSONL, Parquet, mixture YAML)"
    )
    parser.add_argument(
        "--out", default="runs/eval", help="folder for samples and results (default %(default)s)"
    )
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument(
        "--n", type=int, default=1, help="answers per prompt; accuracy is their mean (default 1)"
    )
    parser.add_argument(
        "--batch", type=int, default=64, help="prompts answered together (default %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="default %(default)s")
    parser.add_argument("--min-pixels", type=int)
    parser.add_argument("--max-pixels", type=int)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="default %(default)s"
    )
    parser.add_argument("--verifier", default="math", help="for rows that name none (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UniOPDError as error:
        sys.exit(error_message(error))
