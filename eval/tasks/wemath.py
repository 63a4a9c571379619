"""We-Math (arXiv 2407.01284): 525 problems and the 2 or 3 sub-problems each is made of (1740 questions, CC BY-NC 4.0).

Whether the sub-problems of a solved (or failed) problem are solved too makes it one of four kinds: insufficient
knowledge, inadequate generalization, complete mastery, rote memorization.  From them come the published ``strict``
score, the headline here, and the ``loose`` one.  Rows cut off by a limit have no kind: then there is no headline, only the
accuracy over single questions.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Scores, Source, mean_score
from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers.metrics import wemath_scores

from ._image import BY_LETTER, image_prompt, presets, text_of, verifier_of

CUT_OFF = (
    "We-Math: some problems lack answers to their sub-problems (a limit?), so there is no strict or loose score, only the "
    "accuracy over single questions"
)


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    name = f"wemath/{row['ID']}/{row['key']}"
    return image_prompt(
        name,
        preset,
        {"question": text_of(name, row, "question"), "option": text_of(name, row, "option")},
        row["image_path"],  # the picture itself
        text_of(name, row, "answer").strip(),
        "image_math",
        verifier_of(profile, preset, "wemath", "wemath:upstream"),
    )


def aggregate(rows: Sequence[Row], scores: Sequence[Scores]) -> dict[str, float]:
    """``score`` (strict), ``score_loose`` and the rates of the kinds, means over sample indices; always ``accuracy``."""
    accuracy = mean_score(rows, scores)
    if not accuracy:
        return {}
    problems: dict[str, dict[str, Scores]] = {}
    for row, samples in zip(rows, scores, strict=True):
        if samples:
            problems.setdefault(str(row["ID"]), {})[row["key"]] = samples
    numbers = {"accuracy": accuracy["score"]}
    if not all(_is_complete(parts) for parts in problems.values()):
        warnings.warn(CUT_OFF, stacklevel=2)
        return numbers
    n = min(len(samples) for parts in problems.values() for samples in parts.values())
    runs = [wemath_scores(_right(parts, i) for parts in problems.values()).as_metrics() for i in range(n)]
    return {key: sum(run[key] for run in runs) / n for key in runs[0]} | numbers


def _step_keys(parts: Mapping[str, Scores]) -> tuple[list[str], str]:
    """Keys of the steps and of the whole: ``2steps_1``, ``2steps_2`` and ``2steps_multi``."""
    kind = next(iter(parts)).partition("_")[0]
    return [f"{kind}_{i}" for i in range(1, int(kind[0]) + 1)], f"{kind}_multi"


def _is_complete(parts: Mapping[str, Scores]) -> bool:
    steps, whole = _step_keys(parts)
    return set(parts) == {*steps, whole}


def _right(parts: Mapping[str, Scores], index: int) -> tuple[list[bool], bool]:
    """Which steps, and whether the whole, the samples of one index got right; unknown counts as wrong."""
    steps, whole = _step_keys(parts)
    return [parts[key][index] == 1 for key in steps], parts[whole][index] == 1


BENCHMARK = Benchmark(
    name="wemath",
    title="We-Math",
    domain="image_math",
    sources=(Source("We-Math/We-Math", split="testmini"),),
    columns=("ID", "question", "option", "answer", "image_path", "key"),
    presets=presets("{question}\n{option}", "{question}\n{option}" + BY_LETTER, quick_tokens=2048),
    read=read,
    n_rows=1740,
    metric="strict score",
    aggregate=aggregate,
)
