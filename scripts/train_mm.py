#!/usr/bin/env python
"""Distil a multimodal student on its own rollouts.

    deepspeed scripts/train_mm.py scripts/recipes/quickstart.yaml                    all local devices
    deepspeed scripts/train_mm.py RECIPE student.model=FOLDER optim.lr=2e-6          any setting as key=value
    python    scripts/train_mm.py RECIPE --check                                     look before training, one process

The same command again continues a run that was stopped.  --help lists every setting.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without installation

from uniopd_mm.config import TrainConfig
from uniopd_mm.errors import UniOPDError
from uniopd_mm.settings import load_config
from uniopd_mm.training.arguments import recipe_parser
from uniopd_mm.training.launch import StopRequest, error_message, prepare_environment


def main() -> int:
    args = parse_args()
    config = load_config(TrainConfig, args.recipe, args.overrides)
    prepare_environment()
    stop = StopRequest()
    from uniopd_mm.training.run import Run  # torch from here on

    with Run(config, stop, fresh=args.fresh) as run:
        if args.check:
            return run.check(command=sys.argv)
        train(run)
        return run.finish()


def train(run) -> None:
    """The whole method, one step after another."""
    config, console = run.config, run.console
    run.require_preflight()
    if not run.is_resumed:
        run.evaluate()
    while run.step < config.steps and not run.should_stop():
        with console.phase("sample"):
            groups = run.sample(run.draw(run.step))
        with console.phase("verify"):
            groups = run.verify(groups)
        with console.phase("score"):
            groups = run.teachers.score(groups, config.loss.score_temperature)
        groups, margins = run.assign_advantages(groups)
        with console.phase("update"):
            update = run.trainer.update(groups, correct_mismatch=not run.engine.matches_trainer)
        run.step += 1
        run.log(groups, margins, update)
        if run.is_due(config.eval.every):
            run.evaluate()
        if run.is_due(config.checkpoint.every):
            run.save()


def parse_args() -> argparse.Namespace:
    parser = recipe_parser(__doc__)
    parser.add_argument(
        "--check", action="store_true", help="check settings, data, templates and alignment; no training"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="move an existing run folder aside and start anew"
    )
    parser.add_argument(
        "--local_rank", type=int, default=0, help=argparse.SUPPRESS
    )  # from the deepspeed launcher
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UniOPDError as error:
        sys.exit(error_message(error))
