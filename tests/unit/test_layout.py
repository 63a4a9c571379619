"""Which room may know which: the library never imports the scripts, the processors never import the library."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted(p for p in (ROOT / "uniopd_mm").rglob("*.py") if "processors" not in p.parts)
PURE = ("advantages", "alignment", "balance.py", "difficulty.py", "loss.py")
IMPURE = (
    "torch.distributed",
    "deepspeed",
    "logging",
    "uniopd_mm.distributed",
    "uniopd_mm.training",
    "transformers",
)


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_imports_no_script(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] in ("scripts", "eval", "data", "tests")}


@pytest.mark.parametrize("path", sorted((ROOT / "processors").glob("*.py")), ids=lambda p: p.name)
def test_processors_import_nothing_else_of_the_library(path: Path) -> None:
    ours = {name for name in imports(path) if name.split(".")[0] == "uniopd_mm"}
    assert all(name.startswith("uniopd_mm.processors") for name in ours)


@pytest.mark.parametrize("room", PURE)
def test_the_mathematics_is_pure(room: str) -> None:
    place = ROOT / "uniopd_mm" / room
    for path in [place] if place.is_file() else sorted(place.glob("*.py")):
        assert not {name for name in imports(path) if name.startswith(IMPURE)}, path


def test_the_training_script_is_a_loop_one_can_read() -> None:
    lines = (ROOT / "scripts" / "train_mm.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if line.startswith("class ")]
