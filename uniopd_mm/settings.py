"""Settings: typed blocks read from YAML and ``a.b=value`` overrides, with all problems reported at once.

Unknown keys, wrong types and impossible combinations come with file and line and a suggestion, as one
:class:`ConfigError`.  The blocks themselves are in :mod:`uniopd_mm.config`.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from uniopd_mm.errors import ConfigError


class Settings(BaseModel):
    """A block of settings; the sentence under each field is its documentation and its ``--help`` text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )


C = TypeVar("C", bound=Settings)


def load_config(cls: type[C], recipe: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Settings from a YAML file and ``a.b=value`` overrides; all problems at once as :class:`ConfigError`."""
    values, lines, problems = _read_yaml(recipe) if recipe is not None else ({}, {}, [])
    for override in overrides:
        key, sep, text = override.partition("=")
        if not sep or not key:
            problems.append(f"'{override}' is not of the form key=value, e.g. optim.lr=1e-5")
            continue
        try:
            _set(values, key.split("."), yaml.safe_load(text))
        except (yaml.YAMLError, TypeError) as error:
            problems.append(f"{override}: {' '.join(str(error).split())}")
        lines[tuple(key.split("."))] = "command line"
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        explained = [_explain(cls, item, lines) for item in error.errors(include_url=False)]
        problems += [text for text in explained if text]
    if problems:
        head = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} with the settings"
        raise ConfigError("\n  ".join([f"{head} of {recipe}:" if recipe else f"{head}:", *problems]))
    return config


def from_options(cls: type[C], prefix: str = "--", **values: Any) -> C:
    """Settings given as options of a command, named ``prefix`` and the setting; all problems as one ConfigError."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise ConfigError(
            "; ".join(
                f"{prefix}{str(e['loc'][0]).replace('_', '-')} {e['input']}: {e['msg']}" for e in problems
            )
        ) from error


def dump_config(config: Settings) -> str:
    """The resolved settings as YAML; ``load_config`` reads it back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_diff(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Human-readable differences ``key: old -> new`` of two nested settings dicts."""
    rows = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            rows += config_diff(a, b, f"{prefix}{key}.")
        elif a != b:
            rows.append(f"{prefix}{key}: {a} -> {b}")
    return rows


def describe(cls: type[Settings]) -> str:
    """All settings with default and meaning, one a line, for ``--help``."""
    rows = []
    for key, field in _leaves(cls):
        default = "(required)" if field.is_required() else f"= {field.default}"
        rows.append(f"  {key} {default}\n      {' '.join((field.description or '').split())}")
    return "\n".join(rows)


def _read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str], list[str]]:
    """Values, the place of each key, and duplicate keys as problems."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the recipe {path}: {error.strerror}. Recipes ship in scripts/recipes/."
        ) from error
    lines: dict[tuple[str, ...], str] = {}
    problems: list[str] = []

    def walk(node: yaml.Node, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.SequenceNode):
            for i, child in enumerate(node.value):
                walk(child, (*at, str(i)))
        if isinstance(node, yaml.MappingNode):
            for key, child in node.value:
                here = (*at, str(key.value))
                place = f"{path}:{key.start_mark.line + 1}"
                if here in lines:
                    problems.append(f"{place}: '{'.'.join(here)}' is set twice (first at {lines[here]})")
                lines[here] = place
                walk(child, here)

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings (key: value), found {type(values).__name__}")
    if root is not None:
        walk(root, ())
    return values, lines, problems


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for i, key in enumerate(keys[:-1]):
        child = values.setdefault(key, {})
        if child is None:
            child = values[key] = {}
        if not isinstance(child, dict):
            raise TypeError(f"'{'.'.join(keys[: i + 1])}' is a value, not a block of settings")
        values = child
    values[keys[-1]] = value


def _explain(cls: type[Settings], item: Any, lines: dict[tuple[str, ...], str]) -> str | None:
    """One pydantic error as a sentence with its place and, for unknown keys, a suggestion; None = says nothing new."""
    branch = str(item["loc"][-1]) if item["loc"] else ""
    if isinstance(item["input"], list | dict) and (branch == "str" or branch.startswith("literal[")):
        return None  # `str | list[...]` given a list: the list's own errors are the ones that matter
    if isinstance(item["input"], str) and branch.startswith("dict["):
        return None
    branches = ("list[", "dict[", "literal[")
    loc = tuple(str(part) for part in item["loc"] if part != "str" and not str(part).startswith(branches))
    key = ".".join(loc)
    place = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), "")
    where = f"{place}: " if place else ""
    if item["type"] != "extra_forbidden":
        found = "" if item["type"] == "missing" else f" (found {item['input']!r})"
        return (
            f"{where}{key or 'settings'}: {item['msg'].removeprefix('Value error, ')}{found if key else ''}"
        )
    known = [k for k, _ in _leaves(cls, sections=True)]
    pattern = _generic(cls, loc)
    close = difflib.get_close_matches(pattern, known, n=1, cutoff=0.75)
    if not close:  # right name, wrong block: `lr` for `optim.lr`
        close = [k for k in known if k.rsplit(".", 1)[-1] == loc[-1]][:1]
    if not close:
        return f"{where}Unknown setting '{key}'. --help lists all settings."
    names = iter([part for part, generic in zip(loc, pattern.split("."), strict=True) if generic == "NAME"])
    suggestion = ".".join(next(names, part) if part == "NAME" else part for part in close[0].split("."))
    return f"{where}Unknown setting '{key}'. Did you mean '{suggestion}'?"


def _generic(cls: type[Settings], loc: tuple[str, ...]) -> str:
    """The key with free names and list positions (``teachers.math``) replaced by the placeholder ``_leaves`` uses."""
    parts: list[str] = []
    at: type[Settings] | None = cls
    free = False  # the next part is a name of the user's, or a position in a list
    for part in loc:
        if free:
            parts.append("NAME")
            free = False
            continue
        parts.append(part)
        field = at.model_fields.get(part) if at is not None else None
        at = _settings_in(field.annotation) if field is not None else None
        free = field is not None and _holds_several(field.annotation)
    return ".".join(parts)


def _leaves(cls: type[Settings], prefix: str = "", sections: bool = False) -> Iterator[tuple[str, Any]]:
    """Dotted key and field of every setting; ``teachers.NAME.view`` for what may be given several times."""
    for name, field in cls.model_fields.items():
        inner = _settings_in(field.annotation)
        if inner is None or sections:
            yield prefix + name, field
        if inner is not None:
            middle = "NAME." if _holds_several(field.annotation) else ""
            yield from _leaves(inner, f"{prefix}{name}.{middle}", sections)


def _settings_in(annotation: Any) -> type[Settings] | None:
    """The Settings class inside ``X``, ``X | None``, ``dict[str, X]`` or ``list[X]``; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((s for a in typing.get_args(annotation) if (s := _settings_in(a))), None)


def _holds_several(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (dict, list) or any(
        map(_holds_several, typing.get_args(annotation))
    )
