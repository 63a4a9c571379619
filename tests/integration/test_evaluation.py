"""``eval/run.py`` with the weights behind a real vLLM: the answers and numbers are those of the weights in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from launching import ROOT, environment, write_rows

if TYPE_CHECKING:
    from conftest import Served

pytestmark = pytest.mark.servers

N_ROWS = 12


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with 0, 1 and 2 pictures."""
    return write_rows(tmp_path_factory.mktemp("rows"), N_ROWS)


def evaluate(served: Served, rows: Path, out: Path, *more: object) -> list[dict[str, Any]]:
    """The samples that the command writes."""
    asked = ("--model", served.folder, "--data", rows, "--dtype", "float32", "--max-new-tokens", 10)
    done = subprocess.run(
        [sys.executable, ROOT / "eval" / "run.py", *map(str, asked), "--out", out, *map(str, more)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / rows.stem / "samples.jsonl").read_text().splitlines()]


def behind(served: Served) -> tuple[str, ...]:
    return "--server", served.url, "--server-kind", "vllm"


def test_greedy_answers_are_those_of_this_process(vllm_image: Served, rows: Path, tmp_path: Path) -> None:
    ours = evaluate(vllm_image, rows, tmp_path / "ours", "--temperature", 0)
    theirs = evaluate(vllm_image, rows, tmp_path / "theirs", "--temperature", 0, *behind(vllm_image))
    assert theirs == ours and len(ours) == N_ROWS and not any(one["error"] for one in ours)


def test_more_samples_are_added_to_those_that_are_there(
    vllm_image: Served, rows: Path, tmp_path: Path
) -> None:
    """Sample i is the same whether or not its run was the one that wanted i + 1 samples."""
    asked = ("--temperature", 1, *behind(vllm_image))
    whole = evaluate(vllm_image, rows, tmp_path / "whole", *asked, "--samples", 4)
    few = evaluate(vllm_image, rows, tmp_path / "steps", *asked, "--samples", 3)
    assert few == [one for one in whole if one["index"] < 3]
    assert evaluate(vllm_image, rows, tmp_path / "steps", *asked, "--samples", 4) == whole
    assert len({one["text"] for one in whole}) > N_ROWS
