"""What an installation brings: the one name ``uniopd_mm``, whole, also from a clone that has no symlinks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from uniopd_mm import __version__

ROOT = Path(__file__).parents[2]
INSTALLED = {"uniopd_mm", f"uniopd_mm-{__version__}.dist-info"}
CHECKOUT = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "requirements",
    "uniopd_mm",
    "processors",
)
NEVER_INSTALLED = ("tests", "scripts", "data", "eval")
NOT_IN_A_CLONE = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", "runs")


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module", params=["symlink", "text file"])
def clone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, once as git makes it on Linux and once as on Windows."""
    folder = tmp_path_factory.mktemp("clone")
    for name in (*CHECKOUT, *NEVER_INSTALLED):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=NOT_IN_A_CLONE)
        else:
            shutil.copy(source, folder / name)
    link = folder / "uniopd_mm" / "processors"
    assert link.is_symlink() and os.readlink(link) == "../processors"
    if request.param == "text file":
        link.unlink()
        link.write_text("../processors")
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path) -> Path:
    _run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        "dist",
        ".",
        cwd=clone,
    )
    (built,) = (clone / "dist").glob("*.whl")
    return built


def _make_environment(folder: Path) -> tuple[Path, Path]:
    """An empty virtual environment without pip: its python and its site-packages."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    return folder / "bin" / "python", site


def _install(python: Path, wheel: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    _run(*pip, "--no-deps", "--no-index", wheel, cwd=wheel.parent)


def test_a_wheel_holds_every_module_under_the_one_name(wheel: Path, clone: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == INSTALLED
    written = {path.relative_to(clone).as_posix() for path in (clone / "uniopd_mm").rglob("*.py")}
    linked = {f"uniopd_mm/processors/{path.name}" for path in (clone / "processors").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == written | linked


def test_an_installation_adds_one_top_level_name_and_imports_without_any_dependency(
    wheel: Path, tmp_path: Path
) -> None:
    python, site = _make_environment(tmp_path / "env")
    _install(python, wheel)
    assert {path.name for path in site.iterdir()} == INSTALLED
    code = "from uniopd_mm.processors import get_processor; import uniopd_mm; print(uniopd_mm.__version__)"
    assert _run(python, "-c", code, cwd=tmp_path) == __version__


def test_an_editable_installation_imports_the_checkouts_own_files(clone: Path, tmp_path: Path) -> None:
    code = f"from setuptools.build_meta import build_editable; print(build_editable({str(tmp_path)!r}))"
    wheel = tmp_path / _run(sys.executable, "-c", code, cwd=clone).splitlines()[-1]
    python, _ = _make_environment(tmp_path / "env")
    _install(python, wheel)
    code = (
        "import uniopd_mm.errors as a, uniopd_mm.processors.llava as b; print(a.__file__); print(b.__file__)"
    )
    errors, llava = (Path(line).resolve() for line in _run(python, "-c", code, cwd=tmp_path).splitlines())
    assert errors == clone / "uniopd_mm" / "errors.py"
    assert llava == clone / "processors" / "llava.py"
    with pytest.raises(AssertionError, match="No module named 'tests'"):
        _run(python, "-c", "import tests", cwd=tmp_path)
