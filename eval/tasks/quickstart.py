"""The quickstart's held-out questions about handwritten digits: 400 rows, made by ``make quickstart`` on this machine.

``data/quickstart/README.md`` says what they are.  With ``--source FOLDER`` they are read from ``FOLDER/quickstart``.
"""

from __future__ import annotations

from pathlib import Path

from uniopd_mm.config import SamplingConfig
from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Source
from uniopd_mm.evaluation.tasks import mean_by_domain
from uniopd_mm.rollout import Prompt

CACHE = Path(__file__).resolve().parents[2] / "runs" / "quickstart-cache"
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=40)


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    """The row's own turns and answer; there is no upstream, so both profiles score alike."""
    missing = [image for image in row["images"] if not isinstance(image, dict)]
    if missing:
        raise DataError(f"{row['id']}: the picture {missing[0]} is not beside eval.jsonl")
    return Prompt(
        id=f"quickstart/{row['id']}",
        messages=tuple(row["messages"]),
        images=tuple(row["images"]),
        answer=row["answer"],
        domain=row["domain"],
        verifier=row["verifier"],
        source=f"quickstart/{row['id']}",
    )


BENCHMARK = Benchmark(
    name="quickstart",
    title="quickstart",
    domain="quickstart",
    sources=(Source(str(CACHE), split="eval", files=("eval.jsonl",)),),
    columns=("id", "messages", "images", "answer", "domain", "verifier"),
    presets={"paper": Preset(GREEDY), "quick": Preset(GREEDY, limit=100)},
    read=read,
    aggregate=mean_by_domain,
)
