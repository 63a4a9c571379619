"""Engines sample rollouts.  ``local`` runs in the training process; all share ``sample(groups, n, sampling, ...)``."""

from uniopd_mm.engines.base import Engine, encode_groups, encode_prompt
from uniopd_mm.engines.local import LocalEngine

__all__ = ["Engine", "LocalEngine", "encode_groups", "encode_prompt"]
