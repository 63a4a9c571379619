"""One raw row -> one Prompt: chat rows, LLaVA conversations, and plain columns through a template.  Pure."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from uniopd_mm.config import SourceConfig
from uniopd_mm.errors import ConfigError
from uniopd_mm.prompts.images import image_source
from uniopd_mm.prompts.rows import Row, RowError
from uniopd_mm.rollout import Message, Prompt

T = TypeVar("T")
FIELDS = (
    *("messages", "conversations", "question", "images", "image", "image_text"),
    *("answer", "domain", "verifier", "id"),
)
"""Columns that mean something; all others are only seen by the template."""
MARKER = "<image>"
ROW_NUMBER = "#"
"""``columns: {id: "#"}`` numbers the rows of a set whose own ids repeat."""
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
# LLaVA writes the marker on a line of its own; the line break belongs to the marker, chat templates set their own.
_MARKER = re.compile(rf"\n?{MARKER}\Z|{MARKER}\n?")
_FIELD = re.compile(r"\{\{([^{}\n]+)\}\}|\{([^{}\n]+)\}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_EMPTY = object()


@dataclass(frozen=True, slots=True)
class Known:
    """What a run can use; None = anything goes."""

    domains: Collection[str] | None = None
    verifiers: Collection[str] | None = None
    answer: bool = True
    """Every row must have an answer."""


def check_source(source: SourceConfig) -> None:
    """ConfigError for a source whose ``columns`` or ``prompt`` cannot work, whatever the rows are."""
    fields = template_fields(source.prompt or "")
    gold = {"answer", source.columns.get("answer", "answer")} & fields
    if gold:
        raise ConfigError(
            f"source '{source.path}': its prompt template shows the answer to the student ('{{{min(gold)}}}'). "
            f"Remove it; literal braces are written {{{{{min(gold)}}}}}."
        )
    for name in source.columns:
        if name not in FIELDS and name not in fields:
            close = difflib.get_close_matches(name, [*FIELDS, *fields], n=1)
            hint = f"Did you mean '{close[0]}'?" if close else f"Expected one of {', '.join(FIELDS)}."
            raise ConfigError(f"source '{source.path}': columns.{name} is used nowhere. {hint}")


def template_fields(template: str) -> set[str]:
    """Columns that a prompt template shows."""
    return {match[2] for match in _FIELD.finditer(template) if match[2] is not None}


def parse_row(row: Row, source: SourceConfig, name: str, place: str, number: int, root: str) -> Prompt:
    """The Prompt of a row; RowError lists every problem found in it."""
    row = _rename(row, source.columns)
    problems: list[str] = []

    def attempt(step: Callable[..., T], *args: Any) -> T | None:
        try:
            return step(*args)
        except ValueError as error:
            problems.append(str(error))
            return None

    given = attempt(_listed_images, row)
    turns, last_reply = attempt(_turns, row, source) or (None, None)
    answer = attempt(_answer, last_reply if row.get("answer") is None else row["answer"])
    placed = None if given is None or turns is None else attempt(_place_images, turns, given)
    messages, values = placed or ((), ())
    images = [attempt(_image, value, root, k, len(values)) for k, value in enumerate(values, start=1)]
    image_text = None if placed is None else attempt(_image_text, row.get("image_text"), len(values))
    if problems:
        raise RowError(*problems)
    identity = row.get("id")
    return Prompt(
        id=f"{name}/{number if identity is None or identity == '' else identity}",
        messages=messages,
        images=tuple(images),
        image_text=image_text,
        answer=answer,
        domain=str(row.get("domain") or source.domain or "default"),
        verifier=str(verifier) if (verifier := row.get("verifier") or source.verifier) else None,
        source=place,
    )


def check_prompt(prompt: Prompt, known: Known) -> list[str]:
    """Problems of a parsed row in this run: files that are not there, names that nobody knows, a missing answer."""
    problems = []
    for k, image in enumerate(prompt.images, start=1):
        if isinstance(image, Path) and not os.path.isfile(image):  # Path.is_file raises for overlong names
            problems.append(
                f"image {k} of {len(prompt.images)}: no such file: {str(image)[:200]} (set image_root?)"
            )
    texts = [prompt.id, prompt.messages, prompt.image_text, prompt.answer]
    if _SURROGATE.search(json.dumps(texts, ensure_ascii=False, default=str)):
        problems.append(
            "text with half of a surrogate pair, which no tokenizer reads (a character cut in two?)"
        )
    if known.domains is not None and prompt.domain not in known.domains:
        problems.append(
            f"unknown domain '{prompt.domain}'; teachers serve: {', '.join(sorted(known.domains))}"
        )
    if known.verifiers is not None and prompt.verifier is not None and prompt.verifier not in known.verifiers:
        problems.append(
            f"unknown verifier '{prompt.verifier}'; there are: {', '.join(sorted(known.verifiers))}"
        )
    if known.answer and prompt.answer is None:
        problems.append("the answer is empty")
    return problems


def _rename(row: Row, columns: dict[str, str]) -> Row:
    """The row with our names beside theirs; ``reward_model.ground_truth`` reaches into nested columns."""
    renamed = dict(row)
    missing = []
    for ours, theirs in columns.items():
        value = None if (ours, theirs) == ("id", ROW_NUMBER) else row.get(theirs, _EMPTY)
        if value is _EMPTY:
            value = _reach(row, theirs.split("."))
        if value is _EMPTY:
            missing.append(theirs)
        renamed[ours] = value
    if missing:
        raise RowError(
            f"has no column {_quoted(missing)} (its columns: {', '.join(map(str, row)) or 'none'})"
        )
    return renamed


def _reach(value: Any, path: list[str]) -> Any:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return _EMPTY
        value = value[key]
    return value


def _listed_images(row: Row) -> list[Any]:
    """Values of the ``images`` (or else ``image``) column; a struct without any content is no image."""
    value = row.get("image") if row.get("images") is None else row["images"]
    if value is None or (isinstance(value, dict) and all(inner is None for inner in value.values())):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _turns(row: Row, source: SourceConfig) -> tuple[list[tuple[str, Any]], str | None]:
    """(role, content) turns that end with the user's, and the last assistant reply of a LLaVA row."""
    if row.get("messages") is not None:
        turns, llava = _read_turns(row["messages"], "messages", "role", "content"), False
    elif row.get("conversations") is not None:
        turns, llava = _read_turns(row["conversations"], "conversations", "from", "value"), True
    elif source.prompt is not None or row.get("question") is not None:
        template = "{question}" if source.prompt is None else source.prompt
        return [("user", _render(template, row))], None
    else:
        raise RowError(
            f"has no messages, conversations or question, and its source sets no prompt template "
            f"(its columns: {', '.join(map(str, row)) or 'none'})"
        )
    reply = _content(_parts(turns[-1][1])) if llava and turns[-1][0] == "assistant" else None
    while turns and turns[-1][0] == "assistant":
        turns.pop()  # a prompt ends where the student begins
    if not turns or turns[-1][0] != "user":
        raise RowError("has no user turn to answer")
    return turns, reply if isinstance(reply, str) else None


def _read_turns(value: Any, column: str, role_key: str, content_key: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and all(isinstance(inner, list) for inner in value.values()):
        value = [
            dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=True)
        ]  # columnar turns
    if isinstance(value, str):
        raise RowError(f"`{column}` is text; give a list of turns, or map plain text with a prompt template")
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"`{column}` holds no turns")
    turns = []
    for k, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {k} is {type(turn).__name__}, expected an object")
        role = turn.get(role_key) or turn.get("role")
        content = turn.get(content_key) if turn.get(content_key) is not None else turn.get("content")
        if not isinstance(role, str) or role not in _ROLES:
            raise RowError(f"turn {k} has the role '{role}'; expected system, user or assistant")
        if turn.get("tool_calls"):
            raise RowError(f"turn {k} calls tools, which prompts cannot hold")
        if content is None:
            raise RowError(f"turn {k} ({role}) has no {content_key}")
        turns.append((_ROLES[role], content))
    return turns


def _render(template: str, row: Row) -> str:
    missing = sorted(field for field in template_fields(template) if row.get(field) is None)
    if missing:
        raise RowError(f"column {_quoted(missing)} of the prompt template is missing or null")

    def fill(match: re.Match[str]) -> str:
        return f"{{{match[1]}}}" if match[1] is not None else _shown(row[match[2]])

    return _FIELD.sub(fill, template).strip()


def _shown(value: Any) -> str:
    """A column in a template; lists and objects of choices become lines ``A. ...``."""
    if isinstance(value, list | tuple):
        value = {chr(ord("A") + k): choice for k, choice in enumerate(value)}
    if isinstance(value, dict):
        return "\n".join(f"{letter}. {choice}" for letter, choice in value.items() if choice is not None)
    return str(value)


def _place_images(turns: list[tuple[str, Any]], given: list[Any]) -> tuple[tuple[Message, ...], list[Any]]:
    """Messages whose k-th image part stands for the k-th returned value."""
    contents = [(role, _parts(content)) for role, content in turns]
    if given and not any(kind == "image" for _, parts in contents for kind, _ in parts):
        first = next(k for k, (role, _) in enumerate(contents) if role == "user")
        contents[first] = ("user", [("image", _EMPTY)] * len(given) + contents[first][1])
    bare = sum(kind == "image" and value is _EMPTY for _, parts in contents for kind, value in parts)
    if bare != len(given):
        marked = not given and any(isinstance(content, str) and MARKER in content for _, content in turns)
        hint = f"; a literal {MARKER} goes into a typed text part" if marked else ""
        raise RowError(f"has {_count(bare, 'image placeholder')} but {_count(len(given), 'image')}{hint}")
    rest = iter(given)
    values = [
        next(rest) if value is _EMPTY else value
        for _, parts in contents
        for kind, value in parts
        if kind == "image"
    ]
    messages = tuple({"role": role, "content": _content(parts)} for role, parts in contents)
    if not messages[-1]["content"]:
        raise RowError("the last user turn is empty")
    return messages, values


def _parts(content: Any) -> list[tuple[str, Any]]:
    """("text", str) and ("image", value) parts; the value of a mere placeholder is ``_EMPTY``."""
    if isinstance(content, str):
        parts: list[tuple[str, Any]] = []
        for k, text in enumerate(_MARKER.split(content)):
            parts += [("image", _EMPTY)] if k else []
            parts += [("text", text)] if text else []
        return parts
    if not isinstance(content, list | tuple):
        raise RowError(f"content is {type(content).__name__}, expected text or a list of parts")
    return [_part(part) for part in content]


def _part(part: Any) -> tuple[str, Any]:
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise RowError(f"a content part is {type(part).__name__}, expected an object")
    part = {
        key: value for key, value in part.items() if value is not None
    }  # Arrow fills absent keys with nulls
    kind = part.get("type") or next((key for key in ("image", "image_url", "text") if key in part), None)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise RowError("a text part has no text")
        return "text", part["text"]
    if kind not in ("image", "image_url"):
        raise RowError(f"content parts of type '{kind}' are not supported; expected text, image or image_url")
    value = next(
        (part[key] for key in ("image", "image_url", "url", "path", "base64") if key in part), _EMPTY
    )
    return "image", value


def _content(parts: list[tuple[str, Any]]) -> str | list[dict[str, str]]:
    parts = [(kind, value) for kind, value in parts if kind == "image" or value]
    if all(kind == "text" for kind, _ in parts):
        return "".join(value for _, value in parts)
    return [{"type": "text", "text": value} if kind == "text" else {"type": "image"} for kind, value in parts]


def _answer(value: Any) -> str | list[str] | None:
    """Text, or a list of accepted texts; numbers become text, objects (unit tests) JSON text, blanks None."""
    if value is None:
        return None
    if isinstance(value, dict) or (
        isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value)
    ):
        return json.dumps(value, ensure_ascii=False) if value else None
    if isinstance(value, list | tuple):
        return [text for v in value if v is not None and (text := str(v)).strip()] or None
    if isinstance(value, str | int | float):
        return str(value) if str(value).strip() else None
    raise RowError(f"the answer is {type(value).__name__}, expected text, a number or a list")


def _image(value: Any, root: str, k: int, count: int) -> Any:
    try:
        return image_source(value, root)
    except ValueError as error:
        raise RowError(f"image {k} of {count} {error}") from error


def _image_text(value: Any, n_images: int) -> tuple[str, ...] | None:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(
        text is None or isinstance(text, str) for text in texts
    ):
        raise RowError(f"image_text is {type(value).__name__}, expected text or a list of texts")
    if not any(text and text.strip() for text in texts):
        return None
    if len(texts) != n_images:
        raise RowError(f"has {_count(len(texts), 'image_text')} but {_count(n_images, 'image')}")
    blank = [k for k, text in enumerate(texts, start=1) if not (text and text.strip())]
    if blank:
        raise RowError(f"image_text {blank[0]} of {len(texts)} is empty")
    return tuple(texts)


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
