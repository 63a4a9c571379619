"""Writes the table of families into processors/README.md, from tests that it runs.

    python tests/family_table.py            run the tests, write the table (about 2 minutes)
    python tests/family_table.py --print    run the tests, print the table only

A cell is the number of tests that passed; a failed one shows as FAILED, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "processors" / "README.md"
BEGIN, END = "<!-- families: tests/family_table.py -->", "<!-- end of families -->"
NAMES = (*FAMILIES, "text")
SAME_IDS = "test_ids_and_tensors_equal_those_of_the_familys_own_processor"
TEXT_IDS = "test_text_models_equal_their_tokenizers_chat_template"
NO_IMAGE = ("text only", "no text at all")
SEVERAL = (
    "two images of different size",
    "three images without text",
    "multi-turn with images in both turns",
)
FILES = (
    "tests/parity/test_processors.py",
    "tests/parity/test_wrapper.py",
    "tests/parity/test_shared_prefix.py",
    "tests/unit/test_processors.py",
    "tests/invariant/test_zero3.py",
)


def column_of(test: str, conversation: str | None) -> str | None:
    """Which column a test counts for."""
    if test == SAME_IDS:
        if conversation in NO_IMAGE:
            return "no image"
        return "several images" if conversation in SEVERAL else "one image"
    return {
        TEXT_IDS: "no image",
        "test_images_of_any_size_equal_those_of_the_familys_own_processor": "one image",
        "test_a_batch_equals_the_batch_of_the_familys_own_processor": "batch",
        "test_the_model_takes_a_mixed_batch_and_gives_every_prompt_its_own_logits": "batch",
        "test_a_batch_may_mix_none_one_and_several_images_and_repeat_a_prompt": "batch",
        "test_a_text_only_teacher_never_receives_a_vision_token": "text view",
        "test_gradients_are_those_of_full_rows": "shared prefix",
        "test_scores_do_not_depend_on_chunks_groups_or_padding": "shared prefix",
        "test_sampling_gives_the_tokens_of_full_rows": "shared prefix",
        "test_a_step_of_two_ranks_that_share_the_weights_equals_that_of_one": "ZeRO-3",
    }.get(test)


COLUMNS = ("no image", "one image", "several images", "batch", "text view", "shared prefix", "ZeRO-3")


class Results:
    """pytest plugin: counts outcomes by family and column."""

    def __init__(self) -> None:
        self.passed: dict[str, Counter[str]] = defaultdict(Counter)
        self.failed: dict[str, Counter[str]] = defaultdict(Counter)
        self.cells: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            params = getattr(getattr(item, "callspec", None), "params", {})
            name = next(
                (params[key] for key in ("family", "seeing", "name") if params.get(key) in NAMES),
                "text" if item.originalname == TEXT_IDS else None,
            )
            conversation = params.get("name")
            column = column_of(item.originalname, conversation)
            if name is not None and column is not None:
                self.cells[item.nodeid] = (name, column)
        items[:] = [item for item in items if item.nodeid in self.cells]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, column = self.cells[report.nodeid]
        if report.failed:
            self.failed[name][column] += 1
        elif report.when == "call" and report.passed:
            self.passed[name][column] += 1


def shares_prefix(name: str) -> bool:
    from rooms import build, load

    with tempfile.TemporaryDirectory() as folder:
        return load(build(name, Path(folder))).shared_prefix


def render(results: Results) -> str:
    rows = [["family", *COLUMNS, "video", "PIL only"]]
    for name in NAMES:
        cells = []
        for column in COLUMNS:
            passed, failed = results.passed[name][column], results.failed[name][column]
            cell = f"{failed} FAILED" if failed else str(passed) if passed else "-"
            if column == "shared prefix" and passed and not failed and not shares_prefix(name):
                cell += " (full rows)"
            cells.append(cell)
        pil_only = "-" if importlib.util.find_spec("torchvision") else "yes"
        rows.append([f"`{name}`", *cells, "no", pil_only])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return "\n".join([*lines, "", f"Tests passed, with {versions}."])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="print the table, leave the README alone")
    args = parser.parse_args()
    results = Results()
    os.chdir(ROOT)
    code = pytest.main(["-q", "-m", "", *FILES], plugins=[results])
    table = render(results)
    print(table)
    if not args.print:
        text = README.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
