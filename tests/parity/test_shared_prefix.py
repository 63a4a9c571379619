"""Sharing a prompt among its rollouts changes nothing but the work: the same computation, done once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from families import FAMILIES
from rooms import (
    REPRESENTATIVES,
    load,
    make_groups,
    make_prompt,
    plain_logprobs,
    rebuild,
    sample,
)

from uniopd_mm.config import StudentConfig
from uniopd_mm.engines import encode_groups
from uniopd_mm.models import MultimodalLM, load_student, pad_responses, plan_chunks, stage_of
from uniopd_mm.preflight import check_head
from uniopd_mm.rollout import Group

MIXES = {**dict.fromkeys(FAMILIES, (1, 0, 2)), "text": (0, 0, 0)}
LENGTHS = (1, 9, 4)
"""Of the responses of each group: one token, as long as it may get, truncated."""


def responses_of(model: MultimodalLM, n_groups: int) -> list[torch.Tensor]:
    """Random ordinary tokens, three responses a group."""
    draw = torch.Generator().manual_seed(1)
    suppressed = set(model.processor.suppress_token_ids())
    ordinary = torch.tensor([i for i in range(len(model.processor.tokenizer)) if i not in suppressed])
    return [
        ordinary[torch.randint(len(ordinary), (n,), generator=draw)] for _ in range(n_groups) for n in LENGTHS
    ]


def score(
    model: MultimodalLM, groups: list[Group], responses: list[torch.Tensor], max_tokens: int | None = None
) -> torch.Tensor:
    """log p [M] of all response tokens, one response behind the other."""
    ids, mask = pad_responses(responses, model.processor.pad_token_id)
    row = torch.arange(len(groups)).repeat_interleave(len(LENGTHS))
    chunks = None if max_tokens is None else plan_chunks([len(r) for r in responses], max_tokens)
    return model([g.encoded for g in groups], row, ids, mask, chunks=chunks)[mask]


def stock_scores(model: MultimodalLM, groups: list[Group], responses: list[torch.Tensor]) -> torch.Tensor:
    """The same by the stock model, one unpadded row after the other."""
    return torch.cat([plain_logprobs(model, groups[i // len(LENGTHS)], r) for i, r in enumerate(responses)])


def gradients(model: MultimodalLM, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum that weighs every token differently."""
    model.zero_grad()
    (values * torch.linspace(-1, 1, len(values))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative distance of two gradients; weights that only one of them has must have no gradient there."""
    zero = torch.zeros(())
    names = ours.keys() | wanted.keys()
    apart = sum((ours.get(n, zero) - wanted.get(n, zero)).square().sum() for n in names)
    return float((apart / sum(g.square().sum() for g in wanted.values())).sqrt())


def student(folder: Path, **settings: object) -> MultimodalLM:
    settings = {"freeze": [], **settings}
    return load_student(StudentConfig(model=str(folder), dtype="float32", **settings), seed=3)


SETTINGS = {
    "full weights": {},
    "frozen vision tower": {"freeze": ["vision"]},
    "frozen vision tower and projector": {"freeze": ["vision", "projector"]},
    "LoRA": {"lora": {"rank": 2}},
    "gradient checkpointing": {"gradient_checkpointing": True},
}
CASES = [
    (family, name)
    for family in MIXES
    for name in SETTINGS
    if family in (*REPRESENTATIVES, "text") or name in ("full weights", "frozen vision tower")
]


def assert_exact(model: MultimodalLM, groups: list[Group]) -> dict[str, torch.Tensor]:
    """Scores and gradients, shared and in full rows, are the stock model's; returns the gradients."""
    responses = responses_of(model, len(groups))
    stock = stock_scores(model, groups, responses)
    wanted = gradients(model, stock)
    # transformers' norms and rotations are float32 whatever the model is.
    tolerance = 5e-6 if stock.dtype == torch.float64 else 1e-5
    is_shared = model.shared_prefix
    for model.shared_prefix, max_tokens in ((is_shared, None), (is_shared, 12), (False, 12)):
        values = score(model, groups, responses, max_tokens)
        torch.testing.assert_close(values, stock, atol=1e-5, rtol=0)
        assert distance(gradients(model, values), wanted) <= tolerance
    model.shared_prefix = is_shared
    return wanted


@pytest.mark.parametrize(("family", "name"), CASES)
def test_gradients_are_those_of_full_rows(
    tiny_models: Mapping[str, Path], family: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = student(tiny_models[family], **SETTINGS[name]).double()
    model.train(name == "gradient checkpointing")
    for n, p in model.named_parameters():
        if "lora_B" in n:  # starts at 0, which would hide the gradient of lora_A
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(n)))
    assert model.shared_prefix == (family != "qwen3_5")
    reached = assert_exact(model, make_groups(model, MIXES[family]))
    if family != "text":
        stages = {stage_of(model.model_type, n.removeprefix("model.")) for n in reached}
        assert ("vision" in stages) == ("vision" not in SETTINGS[name].get("freeze", ()))
    assert "past_key_values" not in caplog.text  # transformers says so when it throws a cache away


@pytest.mark.parametrize("family", MIXES)
def test_scores_do_not_depend_on_chunks_groups_or_padding(
    tiny_models: Mapping[str, Path], family: str
) -> None:
    model = load(tiny_models[family])
    groups = make_groups(model, MIXES[family])
    responses = responses_of(model, len(groups))
    with torch.no_grad():
        wanted = stock_scores(model, groups, responses)
        for max_tokens in (None, 1, 10, 10**6):
            torch.testing.assert_close(score(model, groups, responses, max_tokens), wanted, atol=1e-5, rtol=0)
        alone = [score(model, [g], responses[3 * i : 3 * i + 3]) for i, g in enumerate(groups)]
        torch.testing.assert_close(torch.cat(alone), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_groups", (1, 2), ids=("one prompt", "padded prompts"))
@pytest.mark.parametrize("family", ("llava", "gemma3"))
def test_blocks_of_response_tokens_see_what_they_would_together(
    tiny_models: Mapping[str, Path], family: str, n_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_models[family]).requires_grad_(True)
    groups = make_groups(model, (1, 0)[:n_groups])
    responses = responses_of(model, n_groups)
    values = score(model, groups, responses)
    wanted = gradients(model, values)
    for block in (1, 3, 8):
        monkeypatch.setattr("uniopd_mm.models.attention.QUERY_BLOCK", block)
        again = score(model, groups, responses)
        torch.testing.assert_close(again, values, atol=1e-5, rtol=0)
        assert distance(gradients(model, again), wanted) <= 1e-5


@pytest.mark.parametrize("family", (*REPRESENTATIVES, "text"))
def test_what_stands_in_the_padding_is_never_read(tiny_models: Mapping[str, Path], family: str) -> None:
    model = load(tiny_models[family])
    groups = make_groups(model, MIXES[family])
    responses = responses_of(model, len(groups))
    ids, mask = pad_responses(responses, model.processor.pad_token_id)
    row = torch.arange(len(groups)).repeat_interleave(len(LENGTHS))
    encoded = [g.encoded for g in groups]
    with torch.no_grad():
        poisoned = torch.where(mask, ids, responses[0][0])
        assert torch.equal(model(encoded, row, ids, mask), model(encoded, row, poisoned, mask))


SAMPLINGS = {
    "plain": {},
    "truncated": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.001},
    "greedy": {"temperature": 0},
}


STOPS = list(range(7, 512, 20))
"""Tokens that end a response: every twentieth, so that rows, and whole groups, leave the batch."""


def assert_same_samples(folder: Path, n_images: tuple[int, ...], **sampling: object) -> set[int]:
    """Sharing prompts gives the tokens that the model's own cache gives; returns the lengths there were."""
    models = [load(folder, shared_prefix=s) for s in (True, False)]
    groups = make_groups(models[0], n_images)
    settings = {"n": 5, "max_new_tokens": 70, "stop_token_ids": STOPS, **sampling}
    shared, plain = (sample(model, groups, **settings) for model in models)
    lengths = set()
    for ours, wanted in zip(shared, plain, strict=True):
        for a, b in zip(ours.rollouts, wanted.rollouts, strict=True):
            assert a.response_ids.tolist() == b.response_ids.tolist()
            assert a.finish == b.finish
            torch.testing.assert_close(a.sampler_logprobs, b.sampler_logprobs, atol=1e-5, rtol=1e-5)
            lengths.add(len(a.response_ids))
    return lengths


@pytest.mark.parametrize(
    ("family", "name"),
    [(f, n) for f in MIXES for n in SAMPLINGS if n == "plain" or f in (*REPRESENTATIVES, "text")],
)
def test_sampling_gives_the_tokens_of_full_rows(
    tiny_models: Mapping[str, Path], family: str, name: str
) -> None:
    lengths = assert_same_samples(tiny_models[family], MIXES[family], **SAMPLINGS[name])
    if name != "greedy":
        assert len(lengths) > 3


def count_positions(model: MultimodalLM, seen: list[int]) -> None:
    """Adds the positions of every pass through the language model to ``seen``."""
    text = model.transformer.base_model
    layers = getattr(text, "language_model", getattr(text, "text_model", text)).layers
    layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))


@pytest.mark.parametrize("family", MIXES)
def test_a_prompt_runs_once_per_pass(
    tiny_models: Mapping[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = load(tiny_models[family]), []
    monkeypatch.setattr(model.processor, "stop_token_ids", lambda: [])
    (group,) = make_groups(model, MIXES[family][:1])
    n_prompt = len(group.encoded.input_ids)
    count_positions(model, seen)
    (sampled,) = sample(model, [group], n=8, max_new_tokens=5)
    assert seen == [n_prompt] + [8] * 4  # the last token of a response is never fed
    seen.clear()
    responses = [r.response_ids for r in sampled.rollouts]
    ids, mask = pad_responses(responses, model.processor.pad_token_id)
    with torch.no_grad():
        model([group.encoded], torch.zeros(8, dtype=torch.long), ids, mask)
    assert seen == ([n_prompt, 8 * 4] if model.shared_prefix else [8 * (n_prompt + 4)])


# ---------------------------------------------------------------------- images


def count_images(model: MultimodalLM) -> list[int]:
    """One entry per pass through the vision tower."""
    base, calls = model.transformer.base_model, []
    tower = next(getattr(base, n) for n in ("vision_tower", "vision_model", "visual") if hasattr(base, n))
    tower.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("freeze", (["vision"], ["vision", "projector"]))
def test_a_frozen_tower_sees_an_image_once(
    tiny_models: Mapping[str, Path], family: str, freeze: list[str]
) -> None:
    model = student(tiny_models[family], freeze=freeze)
    calls = count_images(model)
    picture, again, other = make_prompt(1, 0), make_prompt(1, 0), make_prompt(2, 5)
    groups = encode_groups([(i, p, p.images) for i, p in enumerate((picture, other, again))], model.processor)
    groups = sample(model, groups, n=2)
    assert len(calls) == 2  # the same picture in another prompt is the same picture
    responses = responses_of(model, len(groups))
    gradients(model, score(model, groups, responses))
    assert len(calls) == 2
    model.images.cache.max_bytes = 0
    sample(model, groups, n=2)  # a new step: what no longer fits is forgotten ...
    assert len(calls) == 4
    gradients(model, score(model, groups, responses))  # ... and what the step itself needs is not
    assert len(calls) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_tower_is_never_taken_from_memory(tiny_models: Mapping[str, Path], family: str) -> None:
    model = student(tiny_models[family])
    (group,) = make_groups(model, (1,))
    calls = count_images(model)
    responses = responses_of(model, 1)
    before = score(model, [group], responses).detach()
    with torch.no_grad():
        for p in model.images.parameters["vision"]:
            p.mul_(1.5)
    assert not torch.allclose(before, score(model, [group], responses))
    assert len(calls) == 2 and not model.images.cache.kept


def test_images_are_forgotten_oldest_first_within_the_memory_allowed(tiny_models: Mapping[str, Path]) -> None:
    model = load(tiny_models["llava"])
    groups = make_groups(model, (1, 1, 1))
    for group in groups:
        sample(model, [group], n=1, max_new_tokens=1)
    size = model.images.cache.n_bytes // 3
    sample(model, groups[:1], n=1, max_new_tokens=1)  # the oldest becomes the newest
    model.images.cache.max_bytes = 2 * size
    model.trim_images()
    assert model.images.cache.n_bytes == 2 * size
    assert [model.knows_images([g.encoded]) for g in groups] == [True, False, True]


# ---------------------------------------------------------------------- kinds of attention

MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [8, 4],
    "output_proj_dims": 32,
}
WINDOW, WIDE = "sliding_attention", "full_attention"
VARIANTS = {
    "narrow window": ("gemma3", {"sliding_window": 5}, {}),
    # As the small sizes: layers that read the keys of earlier ones, and ears.
    "layers that share keys": (
        "gemma4",
        {
            "sliding_window": 16,
            "final_logit_softcapping": 3.0,
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 2,
            "layer_types": [WINDOW, WIDE, WINDOW, WINDOW, WIDE],
            "per_layer_config": {1: {"head_dim": 32}, 4: {"head_dim": 32}},
        },
        {"audio_config": AUDIO},
    ),
    "experts": ("qwen3_vl", MOE, {"model_type": "qwen3_vl_moe"}),
    "experts and linear attention": ("qwen3_5", MOE, {"model_type": "qwen3_5_moe"}),
    "attention to chosen tokens": (
        "qwen3_5",
        {
            **MOE,
            "layer_types": ["linear_attention", "indexed_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "ple_layer_ids": [1],
            "ngram_vocab_size_base": 100,
            "heads_per_ngram": 2,
        },
        {"model_type": "qwen4_exp"},
    ),
}
"""Of the families: (family, settings of its language model, other settings)."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_kinds_of_a_family_are_exact_too(
    tiny_models: Mapping[str, Path], tmp_path: Path, variant: str
) -> None:
    family, text, settings = VARIANTS[variant]
    folder = rebuild(tiny_models[family], tmp_path / "model", text, **settings)
    for checkpointing in (False, True):
        model = student(folder, gradient_checkpointing=checkpointing).train(checkpointing)
        if "num_experts" not in text:  # their products know no float64
            model.double()
        assert_exact(model, make_groups(model, MIXES[family]))
    assert len(assert_same_samples(folder, MIXES[family])) > 3
    model = load(folder)
    (group,) = sample(model, make_groups(model, (2,)), n=1, max_new_tokens=30)
    with torch.no_grad():
        wanted = plain_logprobs(model, group, group.rollouts[0].response_ids)
    torch.testing.assert_close(group.rollouts[0].sampler_logprobs, wanted, atol=1e-5, rtol=1e-5)


SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TEXT_MODELS = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "layer_types": [WIDE, WINDOW]},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "qwen3_next": {
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "num_experts": 0,
        "layer_types": ["linear_attention", WIDE],
    },
    "qwen2_moe": {**MOE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}


def build_text_model(folder: Path, model_type: str) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny.build_text(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SMALL, **TEXT_MODELS[model_type])
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.08)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ("qwen2", "mistral"))
def test_a_response_sees_no_further_back_than_a_sliding_window(model_type: str, tmp_path: Path) -> None:
    folder = build_text_model(tmp_path, model_type)
    model = student(folder).double()
    assert model.shared_prefix
    assert_exact(model, make_groups(model, (0, 0, 0)))
    for n_prompts in (1, 3):  # without and with padding
        assert len(assert_same_samples(folder, (0,) * n_prompts)) > 3


def test_a_window_that_attention_is_not_told_of_is_refused(tmp_path: Path) -> None:
    model = load(build_text_model(tmp_path, "qwen2_moe"))
    with pytest.raises(RuntimeError, match="shared_prefix: false"):
        model.prefill([g.encoded for g in make_groups(model, (0,))])


def test_a_model_that_cannot_share_runs_full_rows_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="uniopd_mm"):
        model = load(build_text_model(tmp_path, "qwen3_next"))
        groups = make_groups(model, (0, 0))
        sampled = sample(model, groups, n=3, max_new_tokens=12)
    notices = [r for r in caplog.records if "shared_prefix is off" in r.getMessage()]
    assert len(notices) == 1 and "linear_attention layers" in notices[0].getMessage()
    responses = [r.response_ids for g in sampled for r in g.rollouts]
    sampler_logprobs = torch.cat([r.sampler_logprobs for g in sampled for r in g.rollouts])
    with torch.no_grad():
        wanted = stock_scores(model, groups, responses)
        torch.testing.assert_close(sampler_logprobs, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(score(model, groups, responses, 10), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ("qwen2_5_vl", "gemma4"))
@pytest.mark.parametrize("shared_prefix", (True, False))
def test_the_head_check_holds_either_way(
    tiny_models: Mapping[str, Path], family: str, shared_prefix: bool
) -> None:
    model = load(tiny_models[family], shared_prefix=shared_prefix)
    assert check_head(model, make_groups(model, (1,))).ok


def test_saved_models_do_not_name_our_attention(tiny_models: Mapping[str, Path], tmp_path: Path) -> None:
    load(tiny_models["llava"]).transformer.save_pretrained(tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text(encoding="utf-8")
