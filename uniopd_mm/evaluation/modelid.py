"""Which weights a result is of: a digest that changes when a folder is trained on, without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from uniopd_mm.config import ModelConfig

_STRIPES = 16
_STRIPE = 4096  # bytes
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt")


def model_identity(settings: ModelConfig) -> dict[str, Any]:
    """Name, revision, and digest of the folder that holds (or caches) the model; null where there is none."""
    folder = model_folder(settings)
    name = str(Path(settings.model).resolve()) if Path(settings.model).is_dir() else settings.model
    return {
        "path": name,
        "revision": settings.revision,
        "digest": folder_digest(folder) if folder is not None else None,
    }


def model_folder(settings: ModelConfig) -> Path | None:
    """The local folder of a model; for a hub id the snapshot in the cache, None if there is none."""
    if Path(settings.model).is_dir():
        return Path(settings.model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(settings.model, "config.json", revision=settings.revision)
    except HFValidationError:  # no name of a repository
        return None
    return Path(found).parent if isinstance(found, str) else None


def folder_digest(folder: Path) -> str:
    """16 hexadecimal digits of the settings and tokenizer files, and of samples of every file of weights."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _SMALL for path in folder.glob(pattern)}):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            for k in range(_STRIPES):
                file.seek(max(0, size - _STRIPE) * k // (_STRIPES - 1))
                digest.update(file.read(_STRIPE))
    return digest.hexdigest()[:16]
