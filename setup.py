"""Packaging.  A wheel installs the one name ``uniopd_mm``; tests, scripts, data and eval stay in the checkout.

``uniopd_mm/processors`` is a symlink to ``processors/`` in the checkout.  The packages are spelled out here, so that a
clone without symlinks (git on Windows writes a text file in their place) builds the same wheel.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
LINKED = {"uniopd_mm.processors": "processors"}

INSTALL = [
    "torch>=2.6",
    "transformers>=5.23,<6",
    "accelerate>=1.0",
    "httpx2>=2,<3",  # servers; huggingface-hub brings it anyway
    "jinja2>=3.1",  # chat templates
    "numpy",
    "pillow>=10.1",
    "pydantic>=2.9",
    "pyyaml",
    "rich",
]
DATA = ["datasets", "pyarrow"]
VERIFIERS = ["math-verify[antlr4-13-2]==0.9.0"]
FIGURES = ["matplotlib"]
TRAIN = ["deepspeed>=0.19,<0.20", "psutil", *DATA, *VERIFIERS, *FIGURES]
LORA = ["peft"]
QUICKSTART = ["scikit-learn"]
EXTRAS = {
    "train": TRAIN,
    "data": [*DATA, *FIGURES],
    "eval": [*DATA, *VERIFIERS],
    "vision": ["torchvision", "qwen-vl-utils>=0.0.14"],
    "lora": LORA,
    "quickstart": QUICKSTART,
    # Compiles against an installed torch: pip install --no-build-isolation "uniopd-mm[flash]"
    "flash": ["flash-attn>=2.8.3; platform_system == 'Linux'"],
    "dev": [
        *(TRAIN + LORA + QUICKSTART),
        "build",
        "hypothesis",
        "num2words",  # SmolVLM's own processor, which the tests compare with
        "pre-commit",
        "pytest",
        "pytest-xdist",
        "qwen-vl-utils>=0.0.14",
        "ruff",
        "setuptools>=77",
        "wheel",
    ],
}


def read_version() -> str:
    """``uniopd_mm.__version__``, without importing the package."""
    source = (ROOT / "uniopd_mm" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('uniopd_mm/__init__.py has no line __version__ = "..."')
    return found[1]


def list_packages() -> list[str]:
    """The packages of the library, found where they really are."""
    packages = set(find_packages(str(ROOT), include=["uniopd_mm", "uniopd_mm.*"]))
    for package, folder in LINKED.items():
        inside = find_packages(str(ROOT / folder))
        packages |= {package, *(f"{package}.{name}" for name in inside)}
    return sorted(packages)


setup(
    name="uniopd-mm",
    version=read_version(),
    description="Multimodal on-policy distillation with outcome-calibrated token advantages (Uni-OPD)",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=list_packages(),
    package_dir={"uniopd_mm": "uniopd_mm", **LINKED},
    package_data={"": ["py.typed", "*.css", "*.html", "*.js", "*.json", "*.yaml"]},
    include_package_data=False,
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"lmms_eval.models": ["uniopd_mm = uniopd_mm.evaluation.lmms_eval:manifest"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
