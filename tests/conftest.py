"""Shared fixtures: tiny random models of every family, built once per session."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest


class TinyModels(Mapping[str, Path]):
    """Family -> folder, built when it is first asked for; ``text`` is a causal LM with the same vocabulary."""

    def __init__(self, root: Path) -> None:
        from families import FAMILIES

        self.root, self.names, self.built = root, (*FAMILIES, "text"), {}

    def __getitem__(self, name: str) -> Path:
        from rooms import build

        if name not in self.built:
            self.built[name] = build(name, self.root / name)
        return self.built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return TinyModels(tmp_path_factory.mktemp("models"))
