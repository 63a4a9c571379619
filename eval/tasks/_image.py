"""What the image benchmarks share: lmms-eval's two ways to ask, prompts with a picture, means by a column.

``paper`` is the protocol of lmms-eval's ``*_reasoning`` tasks: a system prompt that asks for reasoning and then an
``<answer>``, greedy, up to 49152 tokens.  ``quick`` asks for the answer directly, as lmms-eval's ordinary tasks do, but
leaves room for a model that thinks first (lmms-eval's 16 to 64 tokens cut such a model off at a score of 0).

The ``upstream`` profile gives the number of the task whose prompt was used: lmms-eval scores its reasoning tasks with
OpenMMReasoner's recipe, whatever the benchmark's own metric is (its language-model judge is left out).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from string import ascii_uppercase
from typing import Any

from uniopd_mm.config import SamplingConfig
from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.benchmark import Preset, Profile, Row, Scores, mean_score
from uniopd_mm.prompts.images import image_source
from uniopd_mm.rollout import Message, Prompt

THINK = (
    "You are a helpful assistant. When the user asks a question, your response must include two parts: "
    "first, the reasoning process enclosed in <think>...</think> tags, then the final answer enclosed in "
    "<answer>...</answer> tags.Please provide a clear, concise response within <answer> </answer> tags that directly "
    "addresses the question."
)
"""System prompt of lmms-eval's mathvision, dynamath, wemath, logicvista and ai2d reasoning tasks, to the letter."""
ANALYSIS = (
    "You are a helpful assistant. When user asks a question, your response must include two parts: "
    "first, reasoning process enclosed in <analysis>...</analysis> tags, then final answer enclosed in "
    "<answer>...</answer> tags.Please provide a clear, concise response within <answer> </answer> tags that directly "
    "addresses to question."
)
"""The default that its chartqa, docvqa and infovqa reasoning tasks get instead."""
RECIPE = "lmms_eval:reasoning"
REASONING_TOKENS = 49152
QUICK_ROWS = 100
BY_LETTER = "\nAnswer with the option's letter from the given choices directly."


def presets(paper: str, quick: str, quick_tokens: int, system: str | None = THINK) -> dict[str, Preset]:
    """The two presets; ``paper`` and ``quick`` are the user turns."""
    return {
        "paper": Preset(_greedy(REASONING_TOKENS), prompt=paper, system=system),
        "quick": Preset(_greedy(quick_tokens), prompt=quick, limit=QUICK_ROWS),
    }


def _greedy(max_new_tokens: int) -> SamplingConfig:
    return SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens)


def verifier_of(profile: Profile, preset: Preset, strict: str, upstream: str, reasoning: str = RECIPE) -> str:
    """The verifier of a profile; ``upstream`` is ``reasoning`` where the preset's system prompt asks for tags."""
    if profile == "strict":
        return strict
    return reasoning if preset.system else upstream


def image_prompt(
    id: str,
    preset: Preset,
    fields: dict[str, str],
    image: Any,
    answer: str | list[str],
    domain: str,
    verifier: str,
    marker: str | None = None,
) -> Prompt:
    """The preset's turns with one picture, which takes the place of ``marker`` in the text, or stands before it.

    The picture stays as it is in the row, encoded; :class:`DataError` for a row without one.
    """
    try:
        source = image_source(image)
    except ValueError as error:
        raise DataError(f"{id}: the row's image {error}") from error
    before, _, after = "", "", preset.prompt.format(**fields)
    if marker is not None and marker in after:
        before, _, after = after.partition(marker)
    parts = [*_text_part(before), {"type": "image"}, *_text_part(after)]
    system: tuple[Message, ...] = ({"role": "system", "content": preset.system},) if preset.system else ()
    return Prompt(
        id=id,
        messages=(*system, {"role": "user", "content": parts}),
        images=(source,),
        answer=answer,
        domain=domain,
        verifier=verifier,
        source=id,
    )


def _text_part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text.strip()}] if text.strip() else []


def text_of(name: str, row: Row, column: str) -> str:
    """The column's text; :class:`DataError` where there is none."""
    value = row.get(column)
    text = "" if value is None else str(value)
    if not text.strip():
        raise DataError(f"{name}: a row has no '{column}'; its columns: {', '.join(map(str, row))}")
    return text


def content_id(name: str, row: Row) -> str:
    """``name/digest`` of all that a row without an id holds: the same whatever part of the split is loaded."""
    digest = hashlib.sha256()
    for column in sorted(row):
        digest.update(f"\0{column}\0".encode())
        digest.update(_encoded(row[column]))
    return f"{name}/{digest.hexdigest()[:16]}"


def _encoded(value: Any) -> bytes:
    if isinstance(value, dict):  # an image; its path may differ between copies of a data set
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    return value if isinstance(value, bytes) else repr(value).encode()


def lettered(name: str, options: Sequence[str]) -> dict[str, str]:
    """Options by letter, A, B, …"""
    if len(options) > len(ascii_uppercase):
        raise DataError(f"{name}: a row has {len(options)} options; letters reach to {len(ascii_uppercase)}")
    return dict(zip(ascii_uppercase, map(str, options), strict=False))


def option_lines(options: dict[str, str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def mean_where(
    rows: Sequence[Row], scores: Sequence[Scores], key: str, chosen: Callable[[Row], bool]
) -> dict[str, float]:
    """``key``: the mean score of the chosen rows; nothing where none is chosen."""
    members = [i for i, row in enumerate(rows) if chosen(row)]
    mean = mean_score([rows[i] for i in members], [scores[i] for i in members])
    return {key: mean["score"]} if mean else {}


def means_by(column: str) -> Callable[[Sequence[Row], Sequence[Scores]], dict[str, float]]:
    """An ``aggregate`` that adds to ``score`` the mean for each value of a column, as ``column/value``.

    A row with a list of values counts for each of them.
    """

    def values(row: Row) -> list[str]:
        found = row.get(column)
        found = found if isinstance(found, list | tuple) else [found]
        return ["_".join(str(value).lower().split()) for value in found]

    def aggregate(rows: Sequence[Row], scores: Sequence[Scores]) -> dict[str, float]:
        numbers = mean_score(rows, scores)
        for value in sorted({value for row in rows for value in values(row)}):
            numbers |= mean_where(
                rows, scores, f"{column}/{value}", lambda row, value=value: value in values(row)
            )
        return numbers

    return aggregate
