"""VisuLogic (arXiv 2504.15279): 1000 visual puzzles of six kinds with four options, which the picture shows.

lmms-eval has one task, without a system prompt, and gives it 64 tokens: a model that reasons first scores 0.  Both presets
keep its prompt; ``paper`` gives it the tokens of the reasoning tasks.  The repository holds ``data.jsonl`` and a zip
of pictures; ``lscpku/VisuLogic`` holds the same rows with the picture in them.
"""

from __future__ import annotations

from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Source
from uniopd_mm.rollout import Prompt

from ._image import image_prompt, means_by, presets, text_of, verifier_of

PROMPT = "{question}\nAnswer with the option letter only."


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    name = f"visulogic/{row['id']}"
    return image_prompt(
        name,
        preset,
        {"question": text_of(name, row, "question").strip()},
        row.get("image_path", row.get("image")),
        text_of(name, row, "label").strip(),
        "image_logic",
        verifier_of(profile, preset, "choice", "lmms_eval:visulogic"),
    )


BENCHMARK = Benchmark(
    name="visulogic",
    title="VisuLogic",
    domain="image_logic",
    sources=(
        Source("VisuLogic/VisuLogic", split="train", files=("data.jsonl", "images.zip")),
        Source("lscpku/VisuLogic"),
    ),
    columns=("id", "question", "label", "tag"),
    presets=presets(PROMPT, PROMPT, quick_tokens=2048, system=None),
    read=read,
    n_rows=1000,
    aggregate=means_by("tag"),
)
