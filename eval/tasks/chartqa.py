"""ChartQA (arXiv 2203.10244): 2500 questions about charts, half asked by people, half generated.

Relaxed accuracy: numbers within 5 %.  lmms-eval's reasoning task names its metric so too, but scores with the recipe, which
knows no such tolerance: that is what ``--preset paper --profile upstream`` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Scores, Source, mean_score
from uniopd_mm.rollout import Prompt

from ._image import ANALYSIS, content_id, image_prompt, mean_where, presets, text_of, verifier_of

HALVES = {"human_test": "human", "augmented_test": "augmented"}


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    name = content_id("chartqa", row)
    return image_prompt(
        name,
        preset,
        {"question": text_of(name, row, "question")},
        row["image"],
        text_of(name, row, "answer"),
        "chart_document",
        verifier_of(profile, preset, "chart", "lmms_eval:chartqa"),
    )


def aggregate(rows: Sequence[Row], scores: Sequence[Scores]) -> dict[str, float]:
    """``score`` over all questions, ``human`` and ``augmented`` over the halves that are there."""
    numbers = mean_score(rows, scores)
    for value, half in HALVES.items():
        numbers |= mean_where(rows, scores, half, lambda row, value=value: row["type"] == value)
    return numbers


BENCHMARK = Benchmark(
    name="chartqa",
    title="ChartQA",
    domain="chart_document",
    sources=(Source("lmms-lab-encoder/ChartQA"), Source("lmms-lab/ChartQA")),
    columns=("type", "question", "answer", "image"),
    presets=presets(
        "{question}", "{question}\nAnswer the question with a single word.", quick_tokens=512, system=ANALYSIS
    ),
    read=read,
    n_rows=2500,
    metric="relaxed accuracy",
    aggregate=aggregate,
)
