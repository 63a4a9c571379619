"""LogicVista (arXiv 2407.04973): 448 questions of five reasoning skills; the options are in the question or the picture.

The answer is a letter, or a set of letters ("A, C") of which all, and no other, must be named.  Upstream a language model
extracts the letters (VLMEvalKit), or the recipe compares with the first letter alone (lmms-eval).
"""

from __future__ import annotations

from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Source
from uniopd_mm.rollout import Prompt

from ._image import content_id, image_prompt, means_by, presets, text_of, verifier_of

QUICK = "{question}\nAnswer with the option's letter directly; where several options apply, with all their letters."


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    name = f"logicvista/{row['id']}" if row.get("id") is not None else content_id("logicvista", row)
    return image_prompt(
        name,
        preset,
        {"question": text_of(name, row, "question")},
        row["image"],
        text_of(name, row, "answer").strip(),
        "image_logic",
        verifier_of(profile, preset, "logicvista", "logicvista:upstream"),
    )


BENCHMARK = Benchmark(
    name="logicvista",
    title="LogicVista",
    domain="image_logic",
    sources=(Source("lscpku/LogicVista"),),
    columns=("question", "answer", "skill", "image"),
    presets=presets("{question}", QUICK, quick_tokens=2048),
    read=read,
    n_rows=448,
    aggregate=means_by("skill"),
)
