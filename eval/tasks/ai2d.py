"""AI2D (arXiv 1603.07396): 3088 questions about science diagrams; the published answer is the option's index from 0."""

from __future__ import annotations

from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Source
from uniopd_mm.rollout import Prompt

from ._image import BY_LETTER, content_id, image_prompt, lettered, option_lines, presets, text_of, verifier_of

PROMPT = "{question}\n{options}"


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    name = content_id("ai2d", row)
    question, index = text_of(name, row, "question"), text_of(name, row, "answer").strip()
    options = lettered(name, row["options"] or ())
    if not (index.isdecimal() and int(index) < len(options)):
        raise DataError(f"{name}: answer '{index}' is not the index of one of {len(options)} options")
    return image_prompt(
        name,
        preset,
        {"question": question, "options": option_lines(options)},
        row["image"],
        list(options)[int(index)],
        "chart_document",
        verifier_of(profile, preset, "choice", "lmms_eval:ai2d"),
    )


BENCHMARK = Benchmark(
    name="ai2d",
    title="AI2D",
    domain="chart_document",
    sources=(Source("lmms-lab-encoder/ai2d"), Source("lmms-lab/ai2d")),
    columns=("question", "options", "answer", "image"),
    presets=presets(PROMPT, PROMPT + BY_LETTER, quick_tokens=512),
    read=read,
    n_rows=3088,
)
