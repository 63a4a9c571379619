r"""Competition mathematics: problems with one answer in ``\boxed{}``, many samples, micro-averaged.

The protocol is G-OPD's (its ``data/*/test.jsonl`` and evaluation scripts), on which Uni-OPD's text numbers rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from uniopd_mm.config import SamplingConfig
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Scores, Source
from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers.metrics import avg_at_k, cov_at_k, maj_at_k

from ._text import NO_THINKING, row_id, text_of, turns, zero_filled

PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."

PRESETS = {
    "paper": Preset(
        sampling=SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=16384),
        n=32,
        prompt=PROMPT,
        template=NO_THINKING,
    ),
    "quick": Preset(
        sampling=SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=4096),
        n=2,
        prompt=PROMPT,
        template=NO_THINKING,
        limit=10,
    ),
}


def competition(
    name: str, title: str, sources: Sequence[Source], repaired: Mapping[str, str] | None = None
) -> Benchmark:
    """A competition of 30 problems; ``repaired`` maps gold answers that are published broken to what they mean."""

    def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
        question, answer = text_of(name, row, "problem"), text_of(name, row, "answer").strip()
        strict = profile == "strict"
        return Prompt(
            id=row_id(name, row, "id", "problem_idx"),
            messages=turns(preset, question=question),
            answer=(repaired or {}).get(answer, answer) if strict else answer,
            domain="text_math",
            verifier="math" if strict else "math:upstream",
            source=name,
        )

    return Benchmark(
        name=name,
        title=title,
        domain="text_math",
        sources=tuple(sources),
        columns=("problem", "answer"),
        presets=PRESETS,
        read=read,
        n_rows=30,
        metric="avg@k",
        aggregate=averages,
    )


def averages(rows: Sequence[Row], scores: Sequence[Scores]) -> dict[str, float]:
    """``score`` = avg@k over all samples of all problems; ``pass@k`` = any of the k, ``maj@k`` = more than half of them."""
    known = zero_filled(scores)
    if not known:
        return {}
    k = max(map(len, known))
    mean = avg_at_k(known)
    return {"score": mean, f"avg@{k}": mean, f"pass@{k}": cov_at_k(known), f"maj@{k}": maj_at_k(known)}
