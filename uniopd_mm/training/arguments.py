"""What the command lines have in common.  Imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from uniopd_mm.config import TrainConfig
from uniopd_mm.settings import describe


def recipe_parser(description: str | None) -> argparse.ArgumentParser:
    """``RECIPE key=value ...``, with every setting in ``--help``; parse with ``parse_intermixed_args``."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="settings (key=value):\n" + describe(TrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML file; scripts/recipes/ has complete ones")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: a whole number that is not smaller."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number
