"""What the code benchmarks share: evalplus' two published forms of a problem, and pass@1.

evalplus publishes its problems as its own JSONL (inputs and a reference solution, no outputs) and, on the hub, as programs
that hold inputs and expected results as literals.  Both become the same tests; neither is executed in this process.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniopd_mm.config import SamplingConfig
from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.benchmark import Preset, Row, Scores
from uniopd_mm.verifiers.metrics import avg_at_k, cov_at_k

from ._text import NO_THINKING, zero_filled

if TYPE_CHECKING:
    from uniopd_mm.verifiers.code import CodeTests

TIME_LIMIT_S = 10.0
"""Per test: G-OPD's ``--min-time-limit 10``; evalplus' own 1 s measures the machine as well.  Eight times the reference
solution's time, the other limit, is less: evalplus kept the inputs that it does in a second."""
TOTAL_LIMIT_S = 120.0
"""evalplus gives 60 s to the tests of HumanEval and MBPP, and 60 s to those that it added."""

# G-OPD's evalplus asks in these words, on HumanEval+ and MBPP+ alike, and begins no answer for the model.
PROMPT = (
    "{question}\n\n\n"
    "Write Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.\n"
    "You need to think first then write the Python code."
)
# evalplus' own instruction to chat services; for local models it begins the answer as well.
OWN_PROMPT = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```python\n{question}\n```"
)
PRESETS = {
    # As in the tables of G-OPD and Uni-OPD, whose numbers are means of 4 samples (G-OPD's published script is greedy).
    "paper": Preset(
        sampling=SamplingConfig(temperature=1.0, max_new_tokens=16384),
        n=4,
        prompt=PROMPT,
        template=NO_THINKING,
    ),
    "quick": Preset(
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=2048),
        n=1,
        prompt=PROMPT,
        template=NO_THINKING,
        limit=20,
    ),
    "own": Preset(sampling=SamplingConfig(temperature=0.0, max_new_tokens=768), n=1, prompt=OWN_PROMPT),
}


@dataclass(frozen=True)
class Cases:
    """Tests of one function."""

    inputs: list[Any]
    """Argument lists."""
    outputs: list[Any] | None
    """What each must return; None = what the reference solution returns."""
    atol: float
    function: str | None = None
    """Name under which the test calls it."""


def pass_at_1(rows: Sequence[Row], scores: Sequence[Scores]) -> dict[str, float]:
    """``score`` = pass@1, the mean over samples; with several samples also ``pass@k`` = any of the k."""
    known = zero_filled(scores)
    if not known:
        return {}
    k = max(map(len, known))
    return {"score": avg_at_k(known)} | ({f"pass@{k}": cov_at_k(known)} if k > 1 else {})


def native_cases(row: Row, name: str) -> Cases:
    """Tests of a row of evalplus' own JSONL: inputs only."""
    lists = [row.get(column) for column in ("base_input", "plus_input")]
    if not isinstance(lists[0], list) or not isinstance(row.get("atol"), (int, float)):
        raise DataError(
            f"{name}: the row has neither the hub's 'test' nor evalplus' base_input, plus_input and atol; "
            f"its columns: {', '.join(row)}"
        )
    return Cases([list(arguments) for some in lists for arguments in some or ()], None, float(row["atol"]))


def evalplus_tests(name: str, cases: Cases, entry_point: str, reference: str, setup: str = "") -> CodeTests:
    """The tests with evalplus' comparison; where they have no outputs, the reference solution is run for them."""
    from uniopd_mm.verifiers.code import CodeTest, CodeTests
    from uniopd_mm.verifiers.code_compare import NOT_NONE_TASKS

    if not entry_point.isidentifier():
        raise DataError(f"{name}: its test calls no function by its name")
    outputs = cases.outputs
    if outputs is None:
        outputs = reference_outputs(reference, entry_point, cases.inputs, name)
    pairs = zip(cases.inputs, outputs, strict=True)
    if entry_point in NOT_NONE_TASKS:  # what they return may be a match object, which stays in its process
        return CodeTests(
            style="assert",
            tests=tuple(CodeTest(_found_or_not(entry_point, given, wanted)) for given, wanted in pairs),
            entry_point=entry_point,
            setup=setup,
            time_limit_s=TIME_LIMIT_S,
            total_limit_s=TOTAL_LIMIT_S,
        )
    return CodeTests(
        style="call",
        tests=tuple(CodeTest(given, wanted) for given, wanted in pairs),
        compare="evalplus",
        entry_point=entry_point,
        setup=setup,
        atol=cases.atol,
        time_limit_s=TIME_LIMIT_S,
        total_limit_s=TOTAL_LIMIT_S,
    )


def _found_or_not(entry_point: str, arguments: list[Any], found: bool) -> str:
    """The assert that a function finds something, or nothing."""
    return f"assert {'' if found else 'not '}{entry_point}({', '.join(map(repr, arguments))})"


def reference_outputs(code: str, entry_point: str, inputs: list[Any], name: str) -> list[Any]:
    """What the reference solution returns for each argument list: run once in the sandbox, then read from the cache."""
    from uniopd_mm.sandbox.values import decode, encode

    with _long_integers():
        key = repr((code, entry_point, inputs, sys.version_info[:2]))
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    try:
        return decode(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or damaged: made again
        outputs = _run_reference(code, entry_point, inputs, name)
    _write_cache(path, json.dumps(encode(outputs)))
    return outputs


def cache_folder() -> Path:
    """Where expected outputs are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "uniopd_mm" / "expected_outputs"


def _write_cache(path: Path, text: str) -> None:
    """The file appears whole or, where the folder cannot be written, not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # a read-only home costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def _run_reference(code: str, entry_point: str, inputs: list[Any], name: str) -> list[Any]:
    from uniopd_mm.sandbox import Failure, expected_outputs

    # the data set's own solution, not one that a model wrote: it runs at whatever level of isolation there is
    outputs = expected_outputs(code, entry_point, inputs, allow_unsafe=True)
    failures = [output for output in outputs if isinstance(output, Failure)]
    if failures:
        raise DataError(
            f"{name}: the reference solution gives no result for {len(failures)} of {len(inputs)} inputs: {failures[0]}"
        )
    return outputs


def header(prompt: str, entry_point: str) -> str:
    """The imports and helper functions that a prompt has before the function to write."""
    try:
        tree = ast.parse(prompt + "\n    pass\n")
    except SyntaxError:
        return ""
    kept = [node for node in tree.body if getattr(node, "name", None) != entry_point]
    return "\n".join(filter(None, (ast.get_source_segment(prompt, node) for node in kept)))


def cases_of(test: str, name: str) -> Cases:
    """Read a hub ``test`` program: ``inputs = ...``, ``results = ...`` and the tolerance its loop compares with."""
    with _long_integers():
        try:
            tree = ast.parse(test)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise DataError(f"{name}: its test is no Python program: {error}") from error
        statements = list(_statements(tree))  # not all nodes: most of a test is one literal of megabytes
        assigned = {
            node.targets[0].id: node.value
            for node in statements
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        if "inputs" not in assigned:
            raise DataError(f"{name}: its test has no 'inputs = [...]'")
        inputs = value_of(assigned["inputs"], name)
        outputs = value_of(assigned["results"], name) if "results" in assigned else None
    if outputs is not None and len(outputs) != len(inputs):
        raise DataError(f"{name}: its test has {len(inputs)} inputs and {len(outputs)} results")
    loop = next((node for node in statements if isinstance(node, ast.For)), None)
    return Cases([list(arguments) for arguments in inputs], outputs, _tolerance(loop), _called(loop))


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements of the module, and of ``check``."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            yield from node.body
        else:
            yield node


def value_of(node: ast.expr, name: str) -> Any:
    """The value of a literal, where ``inf``, ``nan``, ``set()``, ``-inf`` and complex numbers are literals too."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List():
            return [value_of(item, name) for item in node.elts]
        case ast.Tuple():
            return tuple(value_of(item, name) for item in node.elts)
        case ast.Set():
            return {value_of(item, name) for item in node.elts}
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {value_of(k, name): value_of(v, name) for k, v in zip(keys, values, strict=True) if k}
        case ast.Name(id="inf" | "nan" as number):
            return float(number)
        case ast.Call(func=ast.Name(id="set"), args=[], keywords=[]):
            return set()
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value_of(operand, name)
        case ast.BinOp(op=ast.Add() | ast.Sub() as sign, left=left, right=right):
            first, second = value_of(left, name), value_of(right, name)
            if isinstance(first, (int, float)) and isinstance(second, complex):
                return first + second if isinstance(sign, ast.Add) else first - second
    raise DataError(f"{name}: its test has '{ast.unparse(node)[:80]}' where a literal was expected")


def _tolerance(loop: ast.For | None) -> float:
    """Last argument of the loop's ``assertion(...)``, or the right side of its ``assert ... <= 0.0001``."""
    match loop.body[0] if loop else None:
        case ast.Expr(value=ast.Call(args=[*_, ast.Constant(value=int() | float() as atol)])):
            return float(atol)
        case ast.Assert(test=ast.Compare(comparators=[ast.Constant(value=int() | float() as atol)])):
            return float(atol)
    return 0.0


def _called(loop: ast.For | None) -> str | None:
    """``f`` of the loop's first ``f(*inp)``."""
    for node in ast.walk(loop) if loop else ():
        match node:
            case ast.Call(func=ast.Name(id=name), args=[ast.Starred()]):
                return name
    return None


@contextlib.contextmanager
def _long_integers() -> Iterator[None]:
    """Some expected results are integers with more digits than Python reads by default."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit)
