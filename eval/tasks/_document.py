"""What DocVQA and InfoVQA share: one repository, several accepted answers, ANLS, a test split without answers."""

from __future__ import annotations

from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Source
from uniopd_mm.rollout import Prompt

from ._image import ANALYSIS, image_prompt, presets, text_of, verifier_of


def document_benchmark(name: str, title: str, subset: str, n_rows: int) -> Benchmark:
    """One of the two configurations of ``lmms-lab/DocVQA``, its validation split."""

    def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
        id = f"{name}/{row['questionId']}"
        answers = [str(answer) for answer in row["answers"] or () if str(answer).strip()]
        if not answers:
            raise DataError(
                f"{id}: the row has no answers. The answers of the test split are not public: score the validation split, "
                "or send answers to www.docvqa.org."
            )
        return image_prompt(
            id,
            preset,
            {"question": text_of(id, row, "question")},
            row["image"],
            answers,
            "chart_document",
            verifier_of(profile, preset, "document", "lmms_eval:docvqa", "lmms_eval:docvqa_reasoning"),
        )

    return Benchmark(
        name=name,
        title=title,
        domain="chart_document",
        sources=tuple(
            Source(path, subset, "validation") for path in ("lmms-lab-encoder/DocVQA", "lmms-lab/DocVQA")
        ),
        columns=("questionId", "question", "answers", "image"),
        presets=presets(
            "{question}",
            "{question}\nAnswer the question using a single word or phrase.",
            quick_tokens=512,
            system=ANALYSIS,
        ),
        read=read,
        n_rows=n_rows,
        metric="ANLS",
    )
