"""MATH-Vision (arXiv 2402.14804): 3040 competition problems with a picture; options, or a free-form answer.

lmms-eval puts the picture before the text and leaves the marker ``<image1>`` in it; here the picture stands where the
marker does.  Its stop string "Q:", which ends a chain of thought that restates the question, is not used.
"""

from __future__ import annotations

from uniopd_mm.errors import DataError
from uniopd_mm.evaluation.benchmark import Benchmark, Preset, Profile, Row, Source
from uniopd_mm.rollout import Prompt

from ._image import image_prompt, lettered, means_by, option_lines, presets, text_of, verifier_of

# Glued to the question, as upstream.
PROMPT = 'Please solve the problem step by step and put your answer in one "\\boxed{{}}".{question}{choices}'
BY_LETTER = "\nAnswer the question with the option's letter from the given choices directly."


def read(row: Row, preset: Preset, profile: Profile) -> Prompt:
    name = f"mathvision/{row['id']}"
    question, answer = text_of(name, row, "question"), text_of(name, row, "answer").strip()
    options = lettered(name, row["options"] or ())
    if options and answer not in options:
        raise DataError(f"{name}: answer '{answer}' is none of the options' letters {', '.join(options)}")
    fields = {
        "question": question,
        "choices": f"\nChoices: {option_lines(options)}" if options else "",
        "by_letter": BY_LETTER if options else "",
    }
    return image_prompt(
        name,
        preset,
        fields,
        row["decoded_image"],
        answer,
        "image_math",
        verifier_of(profile, preset, "mathvision", "lmms_eval:mathvision"),
        marker="<image1>",
    )


BENCHMARK = Benchmark(
    name="mathvision",
    title="MathVision",
    domain="image_math",
    sources=(Source("MathLLMs/MathVision"),),
    columns=("id", "question", "options", "decoded_image", "answer", "level", "subject"),
    presets=presets(PROMPT, PROMPT + "{by_letter}", quick_tokens=4096),
    read=read,
    n_rows=3040,
    aggregate=means_by("subject"),
)
