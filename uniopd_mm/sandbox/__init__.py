"""Run programs that a model wrote: outside this process, isolated, and without the expected results.  See README.md."""

from uniopd_mm.sandbox.levels import (
    SAFE_LEVEL,
    Isolation,
    Sandbox,
    SandboxError,
    describe,
    detect,
    expected_outputs,
)
from uniopd_mm.sandbox.run import Failure, Limits, Program, Run, Success

__all__ = [
    "SAFE_LEVEL",
    "Failure",
    "Isolation",
    "Limits",
    "Program",
    "Run",
    "Sandbox",
    "SandboxError",
    "Success",
    "describe",
    "detect",
    "expected_outputs",
]
