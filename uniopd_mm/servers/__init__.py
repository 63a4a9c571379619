"""Servers that score given tokens over HTTP: the pool asks them, the wires speak their languages."""

from uniopd_mm.servers.errors import ReplyError, ServerError
from uniopd_mm.servers.pool import ServerPool
from uniopd_mm.servers.wire import (
    WIRES,
    OpenAIEcho,
    ScoreRequest,
    SGLangGenerate,
    VllmCompletions,
    VllmGenerate,
    Wire,
    png_uri,
)

__all__ = [
    "WIRES",
    "OpenAIEcho",
    "ReplyError",
    "SGLangGenerate",
    "ScoreRequest",
    "ServerError",
    "ServerPool",
    "VllmCompletions",
    "VllmGenerate",
    "Wire",
    "png_uri",
]
