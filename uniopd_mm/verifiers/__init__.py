"""Outcome rewards: is a response right?  The same scoring code serves training rewards and benchmarks.

``get_verifier(name)`` looks a verifier up by its explicit name, ``VerifierPool`` routes a batch of responses by domain.
Two layers: *extraction* (what did the response answer? robust, ours) and *scoring* (is that answer right?).  The
``strict`` profile uses both; an ``upstream…`` profile hands the whole response to a scorer that gives the same number
as a published benchmark's own code, its quirks included.
"""

from uniopd_mm.verifiers.base import Verifier, VerifierError, get_verifier, register_verifier, verifier_names
from uniopd_mm.verifiers.metrics import (
    avg_at_k,
    cov_at_k,
    dynamath_worst_average,
    maj_at_k,
    pass_at_k,
    wemath_scores,
)
from uniopd_mm.verifiers.pool import VerifierPool

__all__ = [
    "Verifier",
    "VerifierError",
    "VerifierPool",
    "avg_at_k",
    "cov_at_k",
    "dynamath_worst_average",
    "get_verifier",
    "maj_at_k",
    "pass_at_k",
    "register_verifier",
    "verifier_names",
    "wemath_scores",
]
