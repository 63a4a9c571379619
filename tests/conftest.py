"""Shared fixtures: tiny random models of every family, built once per session."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder; ``text`` is a causal LM with the same vocabulary."""
    import tiny

    root = tmp_path_factory.mktemp("models")
    return {
        "llava": tiny.build_llava(root / "llava"),
        "qwen2_5_vl": tiny.build_qwen2_5_vl(root / "qwen2_5_vl"),
        "qwen3_vl": tiny.build_qwen3_vl(root / "qwen3_vl"),
        "text": tiny.build_text(root / "text"),
    }
