"""DynaMath (arXiv 2411.00836): 501 questions, each in 10 variants; how well, and how reliably, a model solves them.

``kcz358/DynaMath`` is lmms-eval's copy in one split with a ``question_id``; the authors' own has a split per variant
and no such column.  In both, ``id`` names the question that the variants are of.
"""

from __future__ import annotations

from collections.abc import Sequence

from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Scores, Source
from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers.metrics import dynamath_worst_average

from ._image import content_id, image_prompt, presets, text_of, verifier_of

N_VARIANTS = 10
# The benchmark's own way: its scorer reads the key "short answer".
QUICK = (
    "## Question\n{question}\n\n## Answer\nAnswer with a JSON object of two keys: 'solution', the steps to the answer, and "
    "'short answer', the answer alone. {instruction}"
)
INSTRUCTIONS = {
    "multiple choice": "The short answer is the letter of the option, such as 'A', 'B', 'C' or 'D'.",
    "float": "The short answer is a number with three digits after the point.",
    "text": "Numbers with a fraction have three digits after the point.",
}


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    own = "question_id" in row
    name = f"dynamath/{row['id']}/{row['question_id']}" if own else content_id("dynamath", row)
    return image_prompt(
        name,
        preset,
        {
            "question": text_of(name, row, "question"),
            "instruction": INSTRUCTIONS.get(row["answer_type"], INSTRUCTIONS["text"]),
        },
        row["decoded_image"],
        text_of(name, row, "ground_truth").strip(),
        "image_math",
        verifier_of(profile, preset, "dynamath", "dynamath:upstream"),
    )


def aggregate(rows: Sequence[Row], scores: Sequence[Scores]) -> dict[str, float]:
    """``score``: mean over questions of the mean over their variants; ``worst_case``: of the worst variant, given only
    where every question has all its variants."""
    variants: dict[str, list[float]] = {}
    for row, samples in zip(rows, scores, strict=True):
        if samples:
            mean = sum(score or 0.0 for score in samples) / len(samples)
            variants.setdefault(str(row["id"]), []).append(mean)
    if not variants:
        return {}
    numbers = dynamath_worst_average(variants)
    complete = all(len(group) == N_VARIANTS for group in variants.values())
    return {"score": numbers["average"]} | ({"worst_case": numbers["worst"]} if complete else {})


BENCHMARK = Benchmark(
    name="dynamath",
    title="DynaMath",
    domain="image_math",
    sources=(
        Source("kcz358/DynaMath"),
        Source("DynaMath/DynaMath_Sample", split="sample_variant*", files=("data/sample*-*.parquet",)),
    ),
    columns=("id", "question", "decoded_image", "ground_truth", "answer_type"),
    presets=presets("{question}", QUICK, quick_tokens=4096),
    read=read,
    n_rows=501 * N_VARIANTS,
    metric="average accuracy",
    aggregate=aggregate,
)
