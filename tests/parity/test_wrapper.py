"""A model behind the calls of the library: sampling and scoring are the stock model's, and every family has the three
stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from rooms import (
    REPRESENTATIVES,
    build,
    load,
    make_groups,
    make_teacher,
    plain_logprobs,
    rebuild,
    sample,
)

from uniopd_mm.config import SamplingConfig, StudentConfig
from uniopd_mm.engines import LocalEngine
from uniopd_mm.engines.sampling import sample_tokens, truncate
from uniopd_mm.errors import AlignmentError, ConfigError
from uniopd_mm.models import (
    load_student,
    pad_responses,
    stage_of,
    stage_parameters,
    start_decoding,
    token_logprobs,
)
from uniopd_mm.models.stages import STAGE_PREFIXES
from uniopd_mm.models.vision import TOWERS
from uniopd_mm.processors import registry

MIXES = {**dict.fromkeys(FAMILIES, (1, 0, 2)), "text": (0, 0, 0)}
FEW = (*REPRESENTATIVES, "text")


def score(model, groups):
    rollouts = [r.response_ids for g in groups for r in g.rollouts]
    ids, mask = pad_responses(rollouts, model.processor.pad_token_id)
    row = torch.tensor([i for i, g in enumerate(groups) for _ in g.rollouts])
    return model([g.encoded for g in groups], row, ids, mask), mask


@pytest.mark.parametrize("family", MIXES)
def test_sampled_and_scored_logprobs_are_those_of_the_stock_model(
    tiny_models: Mapping[str, Path], family: str
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


@pytest.mark.parametrize("family", FEW)
def test_a_rollout_does_not_depend_on_its_batch(tiny_models: Mapping[str, Path], family: str) -> None:
    model = load(tiny_models[family])
    groups = make_groups(model, MIXES[family])
    together = sample(model, groups, n=4)
    for alone, whole in zip([sample(model, [g], n=4)[0] for g in groups], together, strict=True):
        for a, b in zip(alone.rollouts, whole.rollouts, strict=True):
            assert a.response_ids.tolist() == b.response_ids.tolist()
            assert a.finish == b.finish
    assert len({tuple(r.response_ids.tolist()) for g in together for r in g.rollouts}) > len(groups)


@pytest.mark.parametrize("family", MIXES)
def test_same_weights_on_both_sides_give_zero_advantage(tiny_models: Mapping[str, Path], family: str) -> None:
    student, twin = load(tiny_models[family]), load(tiny_models[family])
    groups = sample(student, make_groups(student, MIXES[family]))
    for group in make_teacher(twin, student).score(groups):
        for rollout in group.rollouts:
            assert rollout.scored.any()
            gap = (rollout.teacher_logprobs - rollout.sampler_logprobs)[rollout.scored]
            assert gap.abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_give_other_scores(
    tiny_models: Mapping[str, Path], tmp_path: Path, family: str
) -> None:
    student = load(tiny_models[family])
    other = load(build(family, tmp_path / "other", seed=1))
    groups = make_teacher(other, student).score(sample(student, make_groups(student, (1,))))
    rollout = groups[0].rollouts[0]
    assert (rollout.teacher_logprobs - rollout.sampler_logprobs)[rollout.scored].abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_only_teacher_never_receives_a_vision_token(
    tiny_models: Mapping[str, Path], family: str
) -> None:
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
def test_a_vision_token_in_a_response_is_never_scored(tiny_models: Mapping[str, Path], family: str) -> None:
    student = load(tiny_models[family])
    (group,) = sample(student, make_groups(student, (1,)), n=1)
    first, _, *rest = group.rollouts[0].response_ids.tolist()
    spoiled = [
        replace(group.rollouts[0], response_ids=torch.tensor([first, vision_id, *rest]))
        for vision_id in student.processor.vision_token_ids()
    ]
    (scored,) = make_teacher(student, student).score([replace(group, rollouts=tuple(spoiled))])
    for rollout in scored.rollouts:
        assert rollout.scored[0] and not rollout.scored[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_tokens_and_padding_rows_of_the_head_are_never_sampled(
    tiny_models: Mapping[str, Path], family: str
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


def test_greedy_sampling_equals_generate(tiny_models: Mapping[str, Path]) -> None:
    model = load(tiny_models["llava"])
    (group,) = make_groups(model, (1,))
    (done,) = sample(model, [group], n=1, temperature=0, max_new_tokens=8)
    inputs = model.collate([group.encoded])
    forbidden = [[i] for i in LocalEngine(model).suppressed.tolist()]
    wanted = model.transformer.generate(**inputs, do_sample=False, max_new_tokens=8, bad_words_ids=forbidden)
    ids = done.rollouts[0].response_ids
    assert wanted[0, inputs["input_ids"].shape[1] :][: len(ids)].tolist() == ids.tolist()


def test_a_rollout_ends_with_its_stop_token(tiny_models: Mapping[str, Path]) -> None:
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


def test_adapters_start_as_the_seed_says(tiny_models: Mapping[str, Path]) -> None:
    settings = StudentConfig(model=str(tiny_models["text"]), dtype="float32", freeze=[], lora={"rank": 2})
    first, again, other = (load_student(settings, seed).state_dict() for seed in (1, 1, 2))
    random = [name for name in first if "lora_A" in name]
    assert random and all(torch.equal(first[name], again[name]) for name in random)
    assert not any(torch.equal(first[name], other[name]) for name in random)


# ---------------------------------------------------------------------- logits


def test_a_soft_cap_bounds_the_logits_that_are_sampled_and_scored(
    tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    cap = 1.5
    folder = rebuild(tiny_models["gemma4"], tmp_path / "model", {"final_logit_softcapping": cap})
    model = load(folder)
    groups = sample(model, make_groups(model, (1, 0)), temperature=0.5)
    with torch.no_grad():
        assert model.logits(torch.randn(9, 64) * 9).abs().max() <= cap
        scored, mask = score(model, groups)
    rollouts = [(g, r) for g in groups for r in g.rollouts]
    for (group, rollout), ours, real in zip(rollouts, scored, mask, strict=True):
        with torch.no_grad():
            wanted = plain_logprobs(model, group, rollout.response_ids)
        torch.testing.assert_close(ours[real], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", (2, 512), ids=("chunks", "one chunk"))
@pytest.mark.parametrize("is_plain", (True, False), ids=("by hand", "as a module"))
def test_gradients_go_through_a_soft_cap(chunk: int, is_plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uniopd_mm.models.logprobs.CHUNK_ROWS", chunk)
    monkeypatch.setattr("uniopd_mm.models.logprobs.CHUNK_LOGITS", 1)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(5, 11, dtype=torch.float64)
    if not is_plain:
        head.register_forward_hook(lambda *_: None)
    target = torch.randint(11, (7,), generator=draw)
    inputs, weights = (hidden, head.weight, head.bias), torch.linspace(-1, 2, 7)
    logits = 0.8 * torch.tanh(head(hidden) / 0.8) / 0.7
    wanted = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    values = token_logprobs(hidden, head, target, 0.7, softcap=0.8)
    torch.testing.assert_close(values, wanted)
    ours, theirs = (torch.autograd.grad((v * weights).sum(), inputs) for v in (values, wanted))
    torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------- stages


def test_every_family_with_a_processor_has_stages_and_a_tower() -> None:
    assert set(STAGE_PREFIXES) == set(TOWERS) == set(registry._BUILT_IN)


CHANGES = {
    "vision": {"states", "features"},
    "projector": {"features"},
    "language": {"text"},
}
"""Stage -> what its weights decide: of what the tower gives, what the projector makes of it, and how a text is read."""


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_are_what_their_names_say(tiny_models: Mapping[str, Path], family: str) -> None:
    model = load(tiny_models[family])
    seeing, blind = (group.encoded for group in make_groups(model, (1, 0)))

    def look() -> dict[str, tuple[torch.Tensor, ...]]:
        model.images.cache.kept.clear()
        pixels = model.images.take_inputs(model.collate([seeing]))
        return {
            "states": TOWERS[model.model_type].run(model.images.base, pixels),
            "features": model.prepare([seeing]).images[0],
            "text": (start_decoding(model, [blind], n=1).hidden_RH,),
        }

    before = look()
    for stage, changes in CHANGES.items():
        with torch.no_grad():
            for name, parameter in model.model.named_parameters():
                if stage_of(model.model_type, name) == stage:
                    parameter += 0.1 * torch.randn(parameter.shape)
            after = look()
        changed = {key for key in after if any(map(differ, before[key], after[key]))}
        assert changed == changes, stage
        before = after


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_weight_is_in_the_group_of_its_stage(
    tiny_models: Mapping[str, Path], family: str
) -> None:
    model = load_student(StudentConfig(model=str(tiny_models[family]), dtype="float32", freeze=[]))
    stages = stage_parameters(model.model, model.model_type)
    names = {id(p): n for n, p in model.model.named_parameters()}
    assert all(stages.values())
    assert sorted(id(p) for group in stages.values() for p in group) == sorted(names)
    projector = {names[id(p)] for p in stages["projector"]}
    assert ("model.image_newline" in projector) == (family in ("llava_next", "llava_onevision"))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_into_their_stage_alone(tiny_models: Mapping[str, Path], family: str) -> None:
    folder = str(tiny_models[family])
    for stage in CHANGES:
        settings = {"freeze": list(CHANGES), "lora": {"rank": 2, "stages": [stage]}}
        if family == "gemma3" and stage == "projector":  # a bare weight
            with pytest.raises(ConfigError, match="projector of gemma3 has no linear layer"):
                load_student(StudentConfig(model=folder, dtype="float32", **settings))
            continue
        model = load_student(StudentConfig(model=folder, dtype="float32", **settings))
        trained = {name for name, p in model.model.named_parameters() if p.requires_grad}
        assert trained and all(".lora_" in name for name in trained)
        assert {stage_of(model.model_type, name) for name in trained} == {stage}


def test_stages_without_an_adapter_stay_as_frozen_as_they_were(tiny_models: Mapping[str, Path]) -> None:
    settings = StudentConfig(model=str(tiny_models["llava"]), dtype="float32", lora={"rank": 2})
    model = load_student(settings)
    trained = {name for name, p in model.model.named_parameters() if p.requires_grad}
    assert {stage_of("llava", name) for name in trained if ".lora_" in name} == {"language"}
    assert {stage_of("llava", name) for name in trained if ".lora_" not in name} == {"projector"}


def test_what_hears_is_never_trained(tiny_models: Mapping[str, Path], tmp_path: Path) -> None:
    audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
    audio["subsampling_conv_channels"] = [8, 4]
    folder = rebuild(tiny_models["gemma4"], tmp_path / "model", {}, audio_config=audio)
    for lora in (None, {"rank": 2, "stages": list(CHANGES)}):
        settings = StudentConfig(model=str(folder), dtype="float32", freeze=[], lora=lora)
        model = load_student(settings).model
        hearing = {n: p.requires_grad for n, p in model.named_parameters() if "audio" in n}
        assert hearing and not any(hearing.values())
        assert not any(".lora_" in name for name in hearing)


@pytest.mark.parametrize("part", ("text_config", "vision_config"))
def test_dropout_in_any_part_is_refused_where_it_would_act(
    tiny_models: Mapping[str, Path], tmp_path: Path, part: str
) -> None:
    folder = shutil.copytree(tiny_models["gemma3"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[part]["attention_dropout"] = 0.1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = {"model": str(folder), "dtype": "float32"}
    load_student(StudentConfig(**settings))
    with pytest.raises(ConfigError, match=f"{part}.attention_dropout=0.1"):
        load_student(StudentConfig(**settings, gradient_checkpointing=True))


def test_image_tokens_and_features_that_do_not_match_are_refused(tiny_models: Mapping[str, Path]) -> None:
    model = load(tiny_models["llava"])
    (group,) = make_groups(model, (1,))
    ids = group.encoded.input_ids
    ids[(ids == model.processor.image_token_id).nonzero()[0]] = 300
    with pytest.raises(AlignmentError, match="15 image tokens, the vision tower 16 features"):
        model.prepare([group.encoded])
