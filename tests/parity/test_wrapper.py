"""Sharing a prompt is exact: sampling, scoring and gradients against one plain forward pass per rollout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rooms import FAMILIES, load, make_groups, make_teacher, plain_logprobs, sample

from uniopd_mm.config import SamplingConfig, StudentConfig
from uniopd_mm.engines import LocalEngine
from uniopd_mm.engines.sampling import sample_tokens, truncate
from uniopd_mm.models import load_student, pad_responses, stage_of

MIXES = {"llava": (1, 0, 2), "qwen2_5_vl": (1, 0, 2), "qwen3_vl": (1, 0, 2), "text": (0, 0, 0)}


def score(model, groups):
    rollouts = [r.response_ids for g in groups for r in g.rollouts]
    ids, mask = pad_responses(rollouts, model.processor.pad_token_id)
    row = torch.tensor([i for i, g in enumerate(groups) for _ in g.rollouts])
    return model([g.encoded for g in groups], row, ids, mask), mask


@pytest.mark.parametrize("family", MIXES)
def test_sampled_and_scored_logprobs_are_those_of_the_stock_model(
    tiny_models: dict[str, Path], family: str
) -> None:
    model = load(tiny_models[family])
    groups = sample(model, make_groups(model, MIXES[family]))
    with torch.no_grad():
        shared, mask = score(model, groups)
        model.shared_prefix = False
        plain, _ = score(model, groups)
    rollouts = [(g, r) for g in groups for r in g.rollouts]
    for i, (group, rollout) in enumerate(rollouts):
        n = len(rollout.response_ids)
        with torch.no_grad():
            wanted = plain_logprobs(model, group, rollout.response_ids)
        for got in (rollout.sampler_logprobs, shared[i, :n], plain[i, :n]):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert (shared[~mask] == 0).all()


@pytest.mark.parametrize("family", MIXES)
def test_gradients_through_the_shared_prefix_equal_those_of_full_rows(
    tiny_models: dict[str, Path], family: str
) -> None:
    model = load(tiny_models[family]).requires_grad_(True)
    groups = sample(model, make_groups(model, MIXES[family]))
    gradients = []
    for shared in (True, False):
        model.shared_prefix = shared
        model.zero_grad()
        logprobs, mask = score(model, groups)
        weights = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
        (logprobs * weights * mask).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    if family != "text":
        assert any(stage_of(model.model_type, n.removeprefix("model.")) == "vision" for n in gradients[0])
    difference = torch.sqrt(sum((gradients[0][n] - g).square().sum() for n, g in gradients[1].items()))
    size = torch.sqrt(sum(g.square().sum() for g in gradients[1].values()))
    assert difference / size <= 1e-5


@pytest.mark.parametrize("family", MIXES)
def test_a_rollout_does_not_depend_on_its_batch(tiny_models: dict[str, Path], family: str) -> None:
    model = load(tiny_models[family])
    groups = make_groups(model, MIXES[family])
    together = sample(model, groups, n=4)
    for alone, whole in zip([sample(model, [g], n=4)[0] for g in groups], together, strict=True):
        for a, b in zip(alone.rollouts, whole.rollouts, strict=True):
            assert a.response_ids.tolist() == b.response_ids.tolist()
            assert a.finish == b.finish
    assert len({tuple(r.response_ids.tolist()) for g in together for r in g.rollouts}) > len(groups)


@pytest.mark.parametrize("family", MIXES)
def test_same_weights_on_both_sides_give_zero_advantage(tiny_models: dict[str, Path], family: str) -> None:
    student, twin = load(tiny_models[family]), load(tiny_models[family])
    groups = sample(student, make_groups(student, MIXES[family]))
    for group in make_teacher(twin, student).score(groups):
        for rollout in group.rollouts:
            assert rollout.scored.any()
            gap = (rollout.teacher_logprobs - rollout.sampler_logprobs)[rollout.scored]
            assert gap.abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_give_other_scores(tiny_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    import tiny

    student = load(tiny_models[family])
    other = load(getattr(tiny, f"build_{family}")(tmp_path / "other", seed=1))
    groups = make_teacher(other, student).score(sample(student, make_groups(student, (1,))))
    rollout = groups[0].rollouts[0]
    assert (rollout.teacher_logprobs - rollout.sampler_logprobs)[rollout.scored].abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_only_teacher_never_receives_a_vision_token(tiny_models: dict[str, Path], family: str) -> None:
    student, reader = load(tiny_models[family]), load(tiny_models["text"])
    teacher = make_teacher(reader, student, view="text")
    vision = student.processor.vision_token_ids() | reader.processor.vision_token_ids()
    assert vision
    for group in sample(student, make_groups(student, (1, 2))):
        encoded = teacher.encode(group)
        assert not vision & set(encoded.input_ids.tolist())
        assert "picture 0" in reader.processor.decode(encoded.input_ids)
        response = torch.tensor([*group.rollouts[0].response_ids.tolist(), next(iter(vision))])
        assert not vision & set(teacher.aligner.align(response, "length").teacher_ids.tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vision_token_in_a_response_is_never_scored(tiny_models: dict[str, Path], family: str) -> None:
    from dataclasses import replace

    student = load(tiny_models[family])
    (group,) = sample(student, make_groups(student, (1,)), n=1)
    rollout = group.rollouts[0]
    for vision_id in student.processor.vision_token_ids():
        ids = rollout.response_ids.clone()
        ids[1] = vision_id
        spoiled = replace(group, rollouts=(replace(rollout, response_ids=ids),))
        (scored,) = make_teacher(student, student).score([spoiled])
        assert not scored.rollouts[0].scored[1]
        assert scored.rollouts[0].scored[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_tokens_and_padding_rows_of_the_head_are_never_sampled(
    tiny_models: dict[str, Path], family: str
) -> None:
    model = load(tiny_models[family])
    engine = LocalEngine(model)
    n_vocabulary = model.transformer.get_output_embeddings().out_features
    assert model.processor.vision_token_ids() <= set(engine.suppressed.tolist())
    logits = torch.zeros(4, n_vocabulary)
    logits[:, engine.suppressed] = 50.0
    for sampling in (SamplingConfig(), SamplingConfig(temperature=0), SamplingConfig(top_p=0.5, top_k=3)):
        tokens, _ = sample_tokens(
            logits, torch.tensor([0.0, 0.3, 0.7, 1 - 1e-12]), sampling, engine.suppressed
        )
        assert not set(tokens.tolist()) & set(engine.suppressed.tolist())


def test_greedy_sampling_equals_generate(tiny_models: dict[str, Path]) -> None:
    model = load(tiny_models["llava"])
    (group,) = make_groups(model, (1,))
    (done,) = sample(model, [group], n=1, temperature=0, max_new_tokens=8)
    inputs = model.collate([group.encoded])
    forbidden = [[i] for i in LocalEngine(model).suppressed.tolist()]
    wanted = model.transformer.generate(**inputs, do_sample=False, max_new_tokens=8, bad_words_ids=forbidden)
    ids = done.rollouts[0].response_ids
    assert wanted[0, inputs["input_ids"].shape[1] :][: len(ids)].tolist() == ids.tolist()


def test_a_rollout_ends_with_its_stop_token(tiny_models: dict[str, Path]) -> None:
    model = load(tiny_models["text"])
    stop = model.processor.stop_token_ids()[0]
    model.model.get_output_embeddings().weight.data[stop] *= 3  # ends often enough to see both endings
    rollouts = [
        r for g in sample(model, make_groups(model, (0,) * 4), n=8, max_new_tokens=40) for r in g.rollouts
    ]
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        ids = rollout.response_ids.tolist()
        assert stop not in ids[:-1]
        assert (ids[-1] == stop) == (rollout.finish == "stop")
        assert len(ids) == 40 or rollout.finish == "stop"
        assert len(rollout.sampler_logprobs) == len(ids)


def test_sampled_frequencies_follow_the_truncated_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -50.0]])
    sampling = SamplingConfig(temperature=0.7, top_p=0.95, top_k=3)
    n = 20_000
    draws, logprob = sample_tokens(
        logits.expand(n, -1), torch.linspace(0, 1 - 1e-9, n, dtype=torch.float64), sampling, torch.tensor([3])
    )
    allowed = (logits[0] / 0.7).index_fill(0, torch.tensor([3]), -torch.inf).softmax(-1)
    wanted = truncate(allowed[None], sampling)[0]
    frequencies = torch.bincount(draws, minlength=5) / n
    torch.testing.assert_close(frequencies, wanted / wanted.sum(), atol=1e-3, rtol=0)
    torch.testing.assert_close(logprob, (logits[0] / 0.7).log_softmax(-1)[draws])


def test_adapters_start_as_the_seed_says(tiny_models: dict[str, Path]) -> None:
    settings = StudentConfig(model=str(tiny_models["text"]), dtype="float32", freeze=[], lora={"rank": 2})
    first, again, other = (load_student(settings, seed).state_dict() for seed in (1, 1, 2))
    random = [name for name in first if "lora_A" in name]
    assert random and all(torch.equal(first[name], again[name]) for name in random)
    assert not any(torch.equal(first[name], other[name]) for name in random)
