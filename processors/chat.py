"""Chat messages: checked, rendered by the model's own template, no typed text mistaken for an image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from uniopd_mm.processors.errors import ProcessorError
from uniopd_mm.processors.tokens import all_strings, map_strings

Turns = list[dict[str, Any]]
"""Checked messages: content is a string or a list of parts, each ``{"type": "image"}`` or a text part."""

_IMAGE_TYPES = ("image", "image_url")
_FORMS = ("string", "parts", "images")
_PROBE = "Kfoiqrnwz"
_FIRST_STAND_IN = 0xF0000
"""Start of a private-use plane: characters that no text has a reason to hold."""


def check_messages(messages: Sequence[Mapping[str, Any]]) -> Turns:
    """Copy with image parts reduced to ``{"type": "image"}`` and None values dropped; errors name a turn."""
    if isinstance(messages, str | Mapping) or not messages:
        found = f"a {type(messages).__name__}" if messages else "empty"
        raise ProcessorError(
            f"messages is {found}; expected a list of turns such as "
            '[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}].'
        )
    turns = []
    for index, message in enumerate(messages):
        label = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ProcessorError(f"{label} is {message!r:.80}; expected a dict with a role and a content.")
        turn = {key: value for key, value in message.items() if value is not None}
        if isinstance(turn.get("content"), list | tuple):
            turn["content"] = [_check_part(part, label) for part in turn["content"]]
        elif not isinstance(turn.get("content", ""), str):
            found = type(turn["content"]).__name__
            raise ProcessorError(f"{label} has a {found} as content; expected a string or a list of parts.")
        turns.append(turn)
    return turns


def _check_part(part: Any, label: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _IMAGE_TYPES:
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise ProcessorError(
        f"{label} holds the part {part!r:.80}; "
        "expected {'type': 'image'} or {'type': 'text', 'text': '...'}."
    )


def count_images(turns: Turns) -> int:
    return sum(part["type"] == "image" for turn in turns for part in _parts(turn))


def _parts(turn: Mapping[str, Any]) -> list[dict[str, str]]:
    content = turn.get("content", "")
    return content if isinstance(content, list) else []


def replace_images(messages: Sequence[Mapping[str, Any]], image_text: Sequence[str]) -> Turns:
    """Messages with the k-th image part replaced by ``image_text[k]`` on a line of its own; "" removes it."""
    turns = check_messages(messages)
    if isinstance(image_text, str) or count_images(turns) != len(image_text):
        found = "one string" if isinstance(image_text, str) else f"{len(image_text)} texts"
        expected = f"{count_images(turns)} images; expected a list with one text per image."
        raise ProcessorError(f"{found} for {expected}")
    texts = iter(image_text)
    for turn in turns:
        if any(part["type"] == "image" for part in _parts(turn)):
            descriptions = [next(texts) if part["type"] == "image" else None for part in turn["content"]]
            turn["content"] = _describe(turn["content"], descriptions)
    return turns


def _describe(parts: list[dict[str, str]], descriptions: list[str | None]) -> list[dict[str, str]]:
    """Templates join text parts without a space, so line breaks set a description off from its neighbours."""
    described: list[dict[str, str]] = []
    follows_description = False
    for part, description in zip(parts, descriptions, strict=True):
        text = part["text"] if description is None else description
        if not text:
            continue
        meets_description = follows_description or description is not None
        is_apart = not described or described[-1]["text"].endswith("\n") or text.startswith("\n")
        described.append(_text(text if is_apart or not meets_description else f"\n{text}"))
        follows_description = description is not None
    return described


class ChatTemplate:
    """A Jinja chat template and what it can take.

    Templates differ in the content they render: some take strings only, some lists of parts only - and drop
    the other form without a word.  Each role is probed once, and messages are given in the form the template
    renders.
    """

    def __init__(
        self, tokenizer: Any, source: str | None, variables: Mapping[str, Any], image_slot: str
    ) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.variables = dict(variables)
        self.image_slot = image_slot
        """Stands for an image in templates that know no image parts."""
        self._forms: dict[str, frozenset[str]] = {}

    def render(self, turns: Turns, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        if self.source is None:
            raise ProcessorError(
                "The tokenizer has no chat template, so messages cannot be rendered.  Use the instruction-"
                "tuned model, or put its family's template into the model folder as chat_template.jinja."
            )
        try:
            return self._apply([self._in_rendered_form(turn) for turn in turns], add_generation_prompt)
        except (TemplateError, TypeError, AttributeError, KeyError, ValueError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            found = f"these messages (roles: {roles})"
            raise ProcessorError(f"The chat template cannot render {found}: {error}") from error

    def text_after_answer(self) -> str:
        """What the template writes behind an assistant's answer, e.g. ``<|im_end|>``; "" if it takes none."""
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        try:
            return self.render(turns, add_generation_prompt=False).rpartition(_PROBE)[2]
        except ProcessorError:
            return ""

    def _apply(self, turns: Turns, add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            turns,
            chat_template=self.source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.variables,
        )

    def _in_rendered_form(self, turn: dict[str, Any]) -> dict[str, Any]:
        if "content" not in turn:
            return turn
        content, forms = turn["content"], self._forms_of(turn["role"])
        if isinstance(content, str):
            parts_only = "parts" in forms and "string" not in forms
            return {**turn, "content": [_text(content)]} if parts_only else turn
        if "images" not in forms:
            content = [_text(self.image_slot) if part["type"] == "image" else part for part in content]
        if "parts" not in forms:
            content = "".join(part["text"] for part in content)
        return {**turn, "content": content}

    def _forms_of(self, role: str) -> frozenset[str]:
        if role not in self._forms:
            self._forms[role] = frozenset(form for form in _FORMS if self._renders(role, form))
        return self._forms[role]

    def _renders(self, role: str, form: str) -> bool:
        from jinja2 import TemplateError

        probe: Any = _PROBE if form == "string" else [_text(_PROBE)]
        if form == "images":
            probe = [{"type": "image"}, _text(_PROBE)]
        filler: Any = "Hi" if form == "string" else [_text("Hi")]
        before = {"user": [], "system": [], "assistant": ["user"]}.get(role, ["user", "assistant"])
        after = ["user"] if role == "system" else []
        turns = [
            *({"role": name, "content": filler} for name in before),
            {"role": role, "content": probe},
            *({"role": name, "content": filler} for name in after),
        ]
        try:
            rendered = self._apply(turns, add_generation_prompt=False)
        except (TemplateError, TypeError, AttributeError, KeyError, ValueError):
            return False
        if form == "images" and self.image_slot.strip() not in rendered:
            return False
        # A template that takes strings only may print the list of parts as it is.
        return _PROBE in rendered and "'type'" not in rendered and '"type"' not in rendered


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def hide_markers(turns: Turns, markers: Sequence[str]) -> tuple[Turns, dict[str, str]]:
    """Put a private character in the place of every vision marker that somebody typed.

    Returns the changed turns and character -> marker.  Once a template has rendered the turns, a marker in
    the result is the template's own.
    """
    typed = find_markers(turns, markers)
    if not typed:
        return turns, {}
    used = set("".join(all_strings(turns)))
    free = (chr(code) for code in range(_FIRST_STAND_IN, 0x110000) if chr(code) not in used)
    stand_ins = dict(zip(sorted(typed), free, strict=False))
    pattern = _any_of(markers)
    hidden = map_strings(turns, lambda text: pattern.sub(lambda match: stand_ins[match[0]], text))
    return hidden, {character: marker for marker, character in stand_ins.items()}


def find_markers(turns: Turns, markers: Sequence[str]) -> set[str]:
    """The markers that are spelled out in any string of the turns."""
    pattern = _any_of(markers)
    return {marker for text in all_strings(turns) for marker in pattern.findall(text)}


def restore_markers(
    rendered: str, stand_ins: Mapping[str, str], markers: Sequence[str]
) -> tuple[str, list[tuple[str, bool]]]:
    """The rendered text with typed markers put back, and all its markers in order: (marker, was it typed)."""
    found = _any_of([*markers, *stand_ins]).findall(rendered)
    order = [(stand_ins.get(item, item), item in stand_ins) for item in found]
    for character, marker in stand_ins.items():
        rendered = rendered.replace(character, marker)
    return rendered, order


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")
