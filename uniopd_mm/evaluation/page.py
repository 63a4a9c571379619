"""A page of answers to look at: picture, question, response, what was read from it, the gold, and why it counts or not.

One self-contained HTML file a benchmark; everything a model wrote is put in as text, never as markup.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.results import Scored
from uniopd_mm.evaluation.samples import write_whole
from uniopd_mm.evaluation.tasks import Task
from uniopd_mm.prompts import open_images
from uniopd_mm.rollout import Prompt

MOST = 200
"""Samples on a page, failures first."""
THUMB_PIXELS = 320
TEXT_CHARS = 20_000
"""Longer responses are cut in the middle."""
_ORDER = ("wrong", "unparsed", "unknown", "correct")


def write_page(
    path: Path, task: Task, result: Mapping[str, Any], scored: Sequence[Scored], about: Sequence[str]
) -> None:
    """Write the page of one benchmark; ``about`` are lines on how it was made."""
    prompts = {prompt.id: prompt for prompt in task.prompts}
    shown = choose(scored)
    data = {
        "title": task.benchmark.title,
        "about": list(about),
        "result": {key: result[key] for key in ("metric", "score", "interval", "rows", "samples", "more")},
        "counts": Counter(one.state for one in scored),
        "total": len(scored),
        "samples": [_entry(one, prompts[one.sample.id]) for one in shown],
    }
    # "</script>" inside a response must not end the data.
    text = json.dumps(data, ensure_ascii=False).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    template = files("uniopd_mm.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    write_whole(path, template.replace("{{data}}", text.encode("utf-8", "backslashreplace").decode()))


def choose(scored: Sequence[Scored], most: int = MOST) -> list[Scored]:
    """At most ``most`` samples: failures first, but of each kind (also of right answers) a fair number."""
    kinds = {state: [one for one in scored if one.state == state] for state in _ORDER}
    room = {state: min(len(some), most // len(_ORDER)) for state, some in kinds.items()}
    for state in _ORDER:  # what the other kinds leave over, in the order of the list
        room[state] += min(len(kinds[state]) - room[state], most - sum(room.values()))
    return [one for state in _ORDER for one in _spread(kinds[state], room[state])]


def _spread(some: Sequence[Scored], n: int) -> list[Scored]:
    """``n`` of them: of as many prompts as there are, evenly over all, then further samples of the same prompts."""
    firsts = list({one.sample.id: one for one in reversed(some)}.values())[::-1]
    rest = [one for one in some if one not in firsts] if n > len(firsts) else []
    m = min(n, len(firsts))
    return [firsts[i * len(firsts) // m] for i in range(m)] + rest[: n - m]


def _entry(one: Scored, prompt: Prompt) -> dict[str, Any]:
    gold = prompt.answer if isinstance(prompt.answer, list) else [prompt.answer or ""]
    try:
        pictures = [_thumbnail(image) for image in open_images(prompt)]
    except DataError:  # the reason is in the sample
        pictures = []
    return {
        "id": one.sample.id,
        "index": one.sample.index,
        "state": one.state,
        "score": one.score,
        "pictures": pictures,
        "prompt": _turns(prompt),
        "response": _cut(one.sample.text),
        "finish": one.sample.finish,
        "tokens": one.sample.n_tokens,
        "extracted": one.outcome.extracted,
        "gold": [_cut(text, 1000) for text in gold],
        "reason": one.outcome.reason,
    }


def _turns(prompt: Prompt) -> str:
    turns = []
    for message in prompt.messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [p.get("text", "[image]") for p in content]
        text = "".join(part + ("\n" if part == "[image]" else "") for part in parts)
        turns.append(text if message["role"] == "user" else f"[{message['role']}] {text}")
    return _cut("\n\n".join(turns))


def _thumbnail(image: Any) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMB_PIXELS, THUMB_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cut(text: str, most: int = TEXT_CHARS) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
