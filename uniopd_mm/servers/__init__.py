"""Servers over HTTP: the pool asks them, wires speak their languages for scoring given tokens, samplers for sampling."""

from uniopd_mm.servers.errors import ReplyError, ServerError
from uniopd_mm.servers.pool import ServerPool
from uniopd_mm.servers.sampling import SAMPLERS, Sampled, Sampler, SampleRequest, SGLangSampler
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
    "SAMPLERS",
    "WIRES",
    "OpenAIEcho",
    "ReplyError",
    "SGLangGenerate",
    "SGLangSampler",
    "SampleRequest",
    "Sampled",
    "Sampler",
    "ScoreRequest",
    "ServerError",
    "ServerPool",
    "VllmCompletions",
    "VllmGenerate",
    "Wire",
    "png_uri",
]
