"""Engines sample rollouts: ``LocalEngine`` in the training process, ``ServerEngine`` behind inference servers.

All share ``sample(groups, n, sampling, ...)``.
"""

from uniopd_mm.engines.base import Engine, EngineError, encode_groups, encode_prompt
from uniopd_mm.engines.local import LocalEngine
from uniopd_mm.engines.server import ServerEngine, require_comparable

__all__ = [
    "Engine",
    "EngineError",
    "LocalEngine",
    "ServerEngine",
    "encode_groups",
    "encode_prompt",
    "require_comparable",
]
