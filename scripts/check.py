#!/usr/bin/env python
"""Look before training: does this recipe teach what it seems to teach?

    python scripts/check.py RECIPE                          everything, on a few prompts of the recipe's data
    python scripts/check.py RECIPE teachers.math.view=text  any setting as key=value, as for train_mm.py
    python scripts/check.py RECIPE --only grounding         do the teachers use the pictures?
    python scripts/check.py RECIPE --prompts 64             more prompts: slower, surer

Prints what it finds, writes OUT/check/report.json, and exits with status 1 when a check failed.  Trains nothing.  What
teachers answer is kept in OUT/scores, unless score_cache names another folder: a second look asks them nothing again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without installation

from uniopd_mm.config import TrainConfig
from uniopd_mm.errors import UniOPDError
from uniopd_mm.settings import load_config
from uniopd_mm.training.arguments import at_least, recipe_parser
from uniopd_mm.training.launch import StopRequest, error_message, prepare_environment

TOPICS = ("data", "models", "templates", "alignment", "sampling", "grounding")


def main() -> int:
    args = parse_args()
    config = load_config(TrainConfig, args.recipe, args.overrides)
    if config.score_cache is None:
        config = config.model_copy(update={"score_cache": str(Path(config.out) / "scores")})
    prepare_environment()
    stop = StopRequest()
    from uniopd_mm.training.check import CHECK_PROMPTS, check  # torch from here on
    from uniopd_mm.training.run import Run

    train = str(Path(__file__).with_name("train_mm.py"))
    with Run(config, stop) as run:
        return check(run, [train, args.recipe, *args.overrides], args.only, args.prompts or CHECK_PROMPTS)


def parse_args() -> argparse.Namespace:
    parser = recipe_parser(__doc__)
    parser.add_argument("--only", choices=TOPICS, help="one topic instead of all")
    parser.add_argument("--prompts", type=at_least(1), metavar="N", help="prompts to look at (default 16)")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UniOPDError as error:
        sys.exit(error_message(error))
