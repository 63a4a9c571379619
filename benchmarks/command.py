"""The command line that ours.py and peer_trl.py share."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import CASES, Case


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """What run.py takes as well and hands on."""
    parser.add_argument("--steps", type=int, default=4, help="steps; the first is a warm-up (default: 4)")
    parser.add_argument(
        "--freeze",
        nargs="*",
        choices=["vision", "projector", "language"],
        default=[],
        help="stages not trained (default: none)",
    )
    parser.add_argument(
        "--flops", action="store_true", help="count the operations of one more step (much memory)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/benchmarks"),
        help="models and prompts, built once (default: runs/benchmarks)",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared_arguments(parser)
    parser.add_argument("case", choices=CASES, help="what to run; sizes are in cases.py")
    parser.add_argument("--n", type=int, help="rollouts per prompt, instead of the case's")
    parser.add_argument("--prompts", type=int, help="prompts per step, instead of the case's")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")


def chosen_case(args: argparse.Namespace) -> Case:
    """The named case with the sizes of the command line."""
    given = {name: getattr(args, name) for name in ("n", "prompts") if getattr(args, name) is not None}
    return replace(CASES[args.case], **given)


def write_result(result: dict[str, Any], path: Path | None) -> None:
    """Print the measurements, rounded, and write them to ``path``."""
    text = json.dumps(_rounded(result), indent=1)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
