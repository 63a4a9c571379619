"""Troubles of other frameworks: docs/pains.md names tests that exist, and leaves none of the reports out."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import family
from rooms import load, make_groups, make_prompt, make_teacher, sample

from uniopd_mm.engines import encode_prompt
from uniopd_mm.errors import DataError
from uniopd_mm.processors import get_processor
from uniopd_mm.rollout import Group
from uniopd_mm.teachers import LocalTeacher

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "pains.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| [\w-]+/[\w.-]+#\d", line)]
REPORTS = [
    "modelscope/ms-swift#9011",
    "modelscope/ms-swift#9414",
    "modelscope/ms-swift#9429",
    "modelscope/ms-swift#9439",
    "THUDM/slime#1758",
    "strands-rl/strands-sglang#33",
    "redai-studio/Relax#69",
    "sgl-project/sglang#26555",
    "sgl-project/sglang#12383",
    "sgl-project/sglang#3871",
    "sgl-project/sglang#2597",
    "huggingface/trl#6294",
    "huggingface/trl#6718",
    "huggingface/trl#6719",
    "huggingface/trl#6401",
    "PrimeIntellect-ai/prime-rl#1739",
    "vllm-project/vllm#51472",
    "vllm-project/vllm#51478",
    "vllm-project/vllm#16107",
    "verl-project/verl#7038",
    "verl-project/verl#3155",
    "verl-project/verl#5817",
    "modelscope/ms-swift#9287",
    "microsoft/agent-lightning#482",
    "verl-project/verl#6656",
    "PrimeIntellect-ai/prime-rl#2245",
    "huggingface/trl#6832",
    "huggingface/trl#6126",
    "areal-project/AReaL#1728",
    "areal-project/AReaL#1729",
    "modelscope/ms-swift#8436",
    "THU-BPM/RLCSD#6",
    "THUDM/slime#1135",
    "huggingface/trl#6191",
    "allenai/open-instruct#1847",
    "THUDM/slime#1449",
    "modelscope/ms-swift#9526",
    "siyan-zhao/OPSD#10",
    "THUDM/slime#1128",
    "THUDM/slime#2032",
    "rllm-org/rllm#356",
    "huggingface/trl#2215",
    "huggingface/trl#3028",
    "huggingface/trl#6252",
    "meta-pytorch/torchtune#2119",
    "microsoft/LMOps#286",
    "QwenLM/Qwen3-VL#484",
    "verl-project/verl-omni#382",
    "verl-project/verl#5592",
    "verl-project/verl#6867",
    "THUDM/slime#2085",
    "vllm-project/vllm#5907",
    "vllm-project/vllm#5550",
    "vllm-project/vllm#5424",
    "vllm-project/vllm#52054",
    "vllm-project/vllm#14239",
    "vllm-project/vllm#42019",
    "vllm-project/vllm#44106",
    "vllm-project/vllm#56860",
    "sgl-project/sglang#27421",
    "sgl-project/sglang#29555",
    "strands-rl/strands-sglang#34",
    "verl-project/verl#6120",
    "PrimeIntellect-ai/prime-rl#2555",
    "InternLM/lmdeploy#4793",
    "modelscope/ms-swift#6639",
    "modelscope/ms-swift#6413",
    "huggingface/trl#3764",
    "verl-project/verl#6593",
    "verl-project/verl#7733",
    "NVIDIA-NeMo/Automodel#2205",
    "CarperAI/trlx#347",
    "modelscope/ms-swift#6250",
    "huggingface/trl#6827",
    "vllm-project/vllm#44910",
    "vllm-project/vllm#45093",
    "vllm-project/vllm#46125",
    "vllm-project/vllm#48762",
    "huggingface/trl#7198",
    "verl-project/verl#6523",
    "modelscope/ms-swift#9295",
    "verl-project/verl#7307",
    "huggingface/trl#6151",
    "huggingface/trl#7215",
    "THUDM/slime#1417",
    "THUDM/slime#2051",
    "NVIDIA-NeMo/RL#1700",
    "verl-project/verl#7540",
    "THUDM/slime#714",
    "NVIDIA-NeMo/RL#1527",
    "QwenLM/Qwen3#1799",
    "NVIDIA-NeMo/Automodel#2195",
    "EvolvingLMMs-Lab/lmms-engine#86",
    "hiyouga/LlamaFactory#9401",
    "verl-project/verl#6341",
]


def reports_in(row: str) -> list[str]:
    """``a/b#1, #2`` as ``a/b#1`` and ``a/b#2``."""
    found, repository = [], ""
    for name, number in re.findall(r"([\w-]+/[\w.-]+)?#(\d+)", row.split(" | ")[0]):
        repository = name or repository
        found.append(f"{repository}#{number}")
    return found


# ---------------------------------------------------------------------- the page


def test_every_report_has_a_row_and_stays_mentioned():
    found = [report for row in ROWS for report in reports_in(row)]
    assert sorted(found) == sorted(REPORTS)
    assert len(ROWS) == 57


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 57 and PAGE.count("::") == len(named)
    missing = []
    for file in {file for file, _ in named}:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8")) if (ROOT / file).exists() else None
        known = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} if tree else set()
        missing += [f"{file}::{name}" for where, name in named if where == file and name not in known]
    assert not missing


def test_a_row_without_a_test_says_why_none_is_needed():
    for row in ROWS:
        _, _, here, tests = row.strip("| ").split(" | ")
        assert "::" in tests or (tests == "-" and here.startswith(("Cannot happen", "Out of scope")))


# ---------------------------------------------------------------------- troubles that nothing else here is about


def test_a_teacher_with_another_tokenizer_sees_the_picture(
    tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    student = load(tiny_models["llava"])
    folder = family("llava").build(tmp_path, seed=5, tokenizer=tiny.make_tokenizer(400, seed=3))
    teacher = make_teacher(load(folder), student)
    assert not teacher.aligner.by_id
    (group,) = sample(student, make_groups(student, (1,)), n=2)
    inverted = tuple(image.point(lambda value: 255 - value) for image in group.images)
    seen = [_scores(teacher, group, images) for images in (group.images, inverted, group.images)]
    assert torch.equal(seen[0], seen[2])
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def _scores(teacher: LocalTeacher, group: Group, images: tuple[Any, ...]) -> torch.Tensor:
    (scored,) = teacher.score([replace(group, images=images)])
    assert all(rollout.scored.any() for rollout in scored.rollouts)
    return torch.cat([rollout.teacher_logprobs for rollout in scored.rollouts])


def test_a_prompt_that_does_not_fit_is_refused_whole(tiny_models: Mapping[str, Path]) -> None:
    processor = get_processor(tiny_models["llava"])
    prompt = make_prompt(2)
    whole = encode_prompt(processor, prompt, prompt.images)
    n_tokens = len(whole.input_ids)
    fits = encode_prompt(processor, prompt, prompt.images, max_tokens=n_tokens)
    assert torch.equal(fits.input_ids, whole.input_ids)
    with pytest.raises(
        DataError, match=f"{n_tokens} prompt tokens, at most {n_tokens - 1} fit.*remove the row"
    ):
        encode_prompt(processor, prompt, prompt.images, max_tokens=n_tokens - 1)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_pictures_of_every_turn_are_expanded_once(name: str, tiny_models: Mapping[str, Path]) -> None:
    processor = get_processor(tiny_models[name])
    marker = processor.image_token_id
    images = [tiny.random_image(60 + 40 * i, 90, seed=i) for i in range(3)]
    sizes = [processor.expected_image_tokens(image.height, image.width) for image in images]
    turns = []
    for n in (1, 2, 3):
        question = {"type": "text", "text": f"and number {n}?"}
        turns.append({"role": "user", "content": [{"type": "image"}, question]})
        encoded = processor.encode(turns, images[:n])
        assert encoded.collapsed_ids.tolist().count(marker) == n
        assert encoded.input_ids.tolist().count(marker) == sum(sizes[:n])
        turns.append({"role": "assistant", "content": [{"type": "text", "text": "a picture."}]})
