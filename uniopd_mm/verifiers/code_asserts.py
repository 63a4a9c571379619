"""Assert statements taken apart, so that the program's process never sees the value they expect.

``assert f(3) == [1, 2]`` becomes the expression ``f(3)``, evaluated beside the program, and the value ``[1, 2]``, compared
here.  So do ``assert f(3)``, ``assert not f(3)``, ``f(3) is None``, ``sorted(f(3)) == [...]``, ``math.isclose(f(3), 0.5)``,
``abs(f(3) - 0.5) < 1e-6``, ``x = f(3)`` before ``assert x == 2``, and several of them joined by ``and``.  Any other
statement can only run as a whole beside the program, which could forge its success: such a check finds wrong programs, but
cannot show that one is right.
"""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uniopd_mm.errors import DataError
from uniopd_mm.verifiers.code_compare import all_close

_ONE_RESULT = (
    abs,
    bool,
    dict,
    float,
    frozenset,
    int,
    len,
    list,
    max,
    min,
    round,
    set,
    sorted,
    str,
    sum,
    tuple,
)
_WRAPPERS = frozenset(function.__name__ for function in _ONE_RESULT)
"""Functions of one result that do not bring the expected value with them."""
_BOUNDS = {ast.Lt: operator.lt, ast.LtE: operator.le}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to evaluate beside the program, and what its value must be."""

    statements: str
    """Run first."""
    expression: str
    """Then evaluated; empty = nothing."""
    wanted: str
    """What ``holds`` expects, for messages."""
    holds: Callable[[Any], bool] | None = None
    """Decides here; None: the statements decide, beside the program."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """Takes tests apart; knows which names stand for the program's own results."""

    entry_point: str | None
    foreign: frozenset[str]
    """Functions that are not the program's."""
    results: set[str] = field(default_factory=set)
    """Variables that hold a result of the program."""

    def checks(self, test: ast.expr) -> list[Check] | None:
        """Checks whose expected values are known here; None if that is not possible."""
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            parts = [self.checks(value) for value in test.values]
            known = [part for part in parts if part is not None]
            return [check for part in known for check in part] if len(known) == len(parts) else None
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            return self.comparison(test.left, test.ops[0], test.comparators[0])
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and self.asks(test.operand):
            return [
                _check(f"bool({ast.unparse(test.operand)})", "a false value", lambda found: found is False)
            ]
        if isinstance(test, ast.Call) and ast.unparse(test.func) in ("math.isclose", "isclose"):
            return self.isclose(test)
        if self.asks(test):
            return [_check(f"bool({ast.unparse(test)})", "a true value", lambda found: found is True)]
        return None

    def asks(self, node: ast.expr) -> bool:
        """Whether an expression is only a result of the program: nothing in it says what is expected."""
        if isinstance(node, ast.Name):
            return node.id in self.results
        if isinstance(node, ast.Subscript):
            return self.asks(node.value) and _literal(node.slice)[0]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            return False
        name = node.func.id
        if name in _WRAPPERS and name != self.entry_point:
            digits = node.args[1:] if name == "round" else []
            n_results = len(node.args) - len(digits)
            return n_results == 1 and not node.keywords and len(digits) <= 1 and self.asks(node.args[0])
        return name == self.entry_point if self.entry_point else name not in self.foreign

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> list[Check] | None:
        if isinstance(op, ast.Eq) and self.asks(right):
            left, right = right, left
        known, expected = _literal(right)
        if not known:
            return None
        if isinstance(op, ast.Lt | ast.LtE):
            return self.small_difference(left, op, expected)
        if not self.asks(left):
            return None
        if isinstance(op, ast.Eq):
            return [_check(ast.unparse(left), repr(expected), lambda found: found == expected)]
        if isinstance(op, ast.Is) and (expected is None or isinstance(expected, bool)):
            return [_check(ast.unparse(left), repr(expected), lambda found: found is expected)]
        return None

    def small_difference(self, left: ast.expr, op: ast.cmpop, bound: Any) -> list[Check] | None:
        """``abs(f(3) - 0.5) < 1e-6``."""
        if not (isinstance(left, ast.Call) and ast.unparse(left.func) == "abs" and len(left.args) == 1):
            return None
        inner = left.args[0]
        if not (isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Sub)):
            return None
        asked, expected = self.question_and_value(inner.left, inner.right)
        if asked is None:
            return None
        within = _BOUNDS[type(op)]
        return [_check(asked, f"about {expected!r}", lambda found: within(abs(found - expected), bound))]

    def isclose(self, call: ast.Call) -> list[Check] | None:
        """``math.isclose(f(3), 0.5, rel_tol=..., abs_tol=...)``."""
        options = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        asked, expected = self.question_and_value(*call.args) if len(call.args) == 2 else (None, None)
        if asked is None or not all(known for known, _ in options.values()):
            return None
        rtol, atol = (
            options.get(name, (True, default))[1] for name, default in (("rel_tol", 1e-9), ("abs_tol", 0))
        )
        return [_check(asked, f"about {expected!r}", lambda found: all_close(found, expected, rtol, atol))]

    def question_and_value(self, left: ast.expr, right: ast.expr) -> tuple[str | None, Any]:
        """The source of the side that asks the program, and the value of the other; (None, None) if it is not so."""
        for asked, given in ((left, right), (right, left)):
            known, value = _literal(given)
            if known and self.asks(asked):
                return ast.unparse(asked), value
        return None, None

    def note(self, statement: ast.stmt) -> None:
        """Remember ``x = f(3)``; forget ``x`` when it becomes something else."""
        if not isinstance(statement, ast.Assign):
            return
        names = {target.id for target in statement.targets if isinstance(target, ast.Name)}
        self.results.difference_update(names)
        if self.asks(statement.value):
            self.results.update(names)


def parse_checks(code: str, entry_point: str | None = None, setup: str = "") -> list[Check]:
    """The checks of a piece of test code; DataError if it is not Python."""
    body, helpers = _parse(code), _parse(setup)
    defined = {
        node.name
        for tree in (body, helpers)
        for node in tree
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in (*body, *helpers)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    reader = _Reader(entry_point, frozenset(defined | imported | set(dir(builtins))))
    checks: list[Check] = []
    before: list[ast.stmt] = []
    for statement in body:
        found = reader.checks(statement.test) if isinstance(statement, ast.Assert) else None
        if found is not None:
            statements = _source(before)
            before = []
            if statements:
                checks.append(Check(statements, "", "no error", lambda _: True))
            checks += found
            continue
        before.append(statement)
        reader.note(statement)
        if isinstance(statement, ast.Assert) or any(isinstance(n, ast.Assert) for n in ast.walk(statement)):
            checks.append(Check(_source(before), "", "no error"))
            before = []
    if before or not checks:
        checks.append(Check(_source(before), "", "no error"))
    return checks


def _check(expression: str, wanted: str, holds: Callable[[Any], bool]) -> Check:
    return Check("", expression, wanted, holds)


def _parse(code: str) -> list[ast.stmt]:
    try:
        return ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"code tests: {code[:80]!r} is not Python ({error})") from None


def _literal(node: ast.expr) -> tuple[bool, Any]:
    try:
        return True, ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False, None


def _source(statements: list[ast.stmt]) -> str:
    return "\n".join(ast.unparse(statement) for statement in statements)
