"""A LLaVA out of parts: nothing of the parts is lost, the stock classes load it, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms import CPU, load, make_groups, plain_logprobs, sample

from uniopd_mm.config import ModelConfig
from uniopd_mm.errors import ConfigError
from uniopd_mm.models import load_model
from uniopd_mm.models.assemble import assemble_llava, init_projector, teach_images
from uniopd_mm.processors import get_processor

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "assemble_llava.py"
VISION: dict[str, Any] = {
    "image_size": 56,
    "patch_size": 14,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TEXT = {**VISION, "vocab_size": 60, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}
TOKENS_OF_AN_IMAGE = 16
PICTURE_TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is shown ?"}]}]


# ---------------------------------------------------------------------- parts


def build_tower(folder: Path, kind: str, **changes: Any) -> Path:
    """``clip`` and ``siglip``: whole models; ``clip_vision``: the vision part alone."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        SiglipConfig,
        SiglipImageProcessorPil,
        SiglipModel,
    )

    torch.manual_seed(1)
    vision = {**VISION, **changes}
    if kind == "siglip":
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=TEXT))
        images = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    else:
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=TEXT))
        model = model.vision_model if kind == "clip_vision" else model
        images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def build_other_lm(folder: Path, name: str, **changes: Any) -> Path:
    """A language model of any transformers family, by the names of its classes."""
    import transformers

    tokenizer = tiny.make_tokenizer()
    config = getattr(transformers, f"{name}Config")(**tiny._text_settings(tokenizer, 2, False), **changes)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    return tiny._save(folder, model_class, config, tokenizer, tiny.TEXT_TEMPLATE, {}, 0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    towers = {kind: build_tower(root / kind, kind) for kind in ("clip", "clip_vision", "siglip")}
    return {
        **towers,
        "qwen3": tiny.build_text(root / "qwen3", seed=2, tie=True),
        "llama": tiny.build_text(root / "llama", seed=3, family="llama"),
        "mixtral": build_other_lm(root / "mixtral", "Mixtral", num_local_experts=2),
    }


@pytest.fixture(scope="module")
def assembled(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(tower, language model, **options) -> folder, each made once."""
    root = tmp_path_factory.mktemp("assembled")

    @cache
    def make(vision: str, language: str, **options: Any) -> Path:
        folder = root / "_".join([vision, language, *map(str, options.values())])
        made = assemble_llava(parts[vision], parts[language], folder, **{"dtype": "float32", **options})
        assert made.folder == folder
        return folder

    return make


def load_stock(folder: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def load_part(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("vision", ["clip", "clip_vision", "siglip"])
def test_the_vision_tower_keeps_its_weights(parts: dict[str, Path], assembled: Any, vision: str) -> None:
    from safetensors.torch import load_file

    kept = load_stock(assembled(vision, "qwen3")).model.vision_tower.state_dict()
    source = load_file(parts[vision] / "model.safetensors")
    assert all(torch.equal(kept[name], source.get(f"vision_model.{name}", source.get(name))) for name in kept)


@pytest.mark.parametrize("language", ["qwen3", "llama", "mixtral"])
def test_the_language_model_keeps_its_weights_and_its_logits_on_text(
    parts: dict[str, Path], assembled: Any, language: str
) -> None:
    model, lm = load_stock(assembled("siglip", language)), load_part(parts[language])
    for ours, theirs in ((model.model.language_model, lm.model), (model.lm_head, lm.lm_head)):
        kept = ours.state_dict()
        assert all(torch.equal(kept[name], value) for name, value in theirs.state_dict().items())
    ids = torch.randint(8, 500, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, lm(ids).logits, atol=1e-6, rtol=0)
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert is_tied == lm.config.tie_word_embeddings


def test_stop_tokens_and_sampling_settings_of_the_language_model_are_kept(
    parts: dict[str, Path], assembled: Any, tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    lm = load_part(parts["llama"])
    lm.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0, do_sample=True, top_k=7)
    lm.save_pretrained(tmp_path / "lm")
    get_processor(parts["llama"]).save_pretrained(tmp_path / "lm")
    assemble_llava(parts["clip"], tmp_path / "lm", tmp_path / "out", dtype="float32")
    kept = load_stock(tmp_path / "out").generation_config
    assert (kept.eos_token_id, kept.do_sample, kept.top_k) == ([2, 0], True, 7)
    assert get_processor(tmp_path / "out").stop_token_ids() == [2, 0]


def test_the_projector_depends_on_the_seed_alone(assembled: Any) -> None:
    def weights(*names: str, **options: Any) -> torch.Tensor:
        return load_stock(assembled(*names, **options)).model.multi_modal_projector.linear_1.weight

    torch.manual_seed(99)
    first = weights("clip", "qwen3")
    assert torch.equal(first, weights("clip", "llama"))
    assert not torch.equal(first, weights("clip", "qwen3", seed=1))


def test_the_linear_projector_is_one_linear_layer_at_first_and_linear_for_ever(assembled: Any) -> None:
    projector = load_stock(assembled("siglip", "llama", projector="linear")).model.multi_modal_projector
    a, b = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(projector(a), projector.linear_1(a))
        init_projector(projector, seed=5, is_linear=False)  # as training would leave it: any weights
        torch.testing.assert_close(projector((a + b) / 2), (projector(a) + projector(b)) / 2)


def test_a_new_token_gets_the_mean_row_and_the_others_keep_theirs(
    parts: dict[str, Path], assembled: Any
) -> None:
    for language in ("qwen3", "llama"):
        model = load_stock(assembled("siglip", language, image_token="<picture>"))
        lm = load_part(parts[language])
        n_old = lm.config.vocab_size
        assert model.config.image_token_id == n_old
        assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == 576
        for part in ("get_input_embeddings", "get_output_embeddings"):
            ours, theirs = getattr(model, part)().weight, getattr(lm, part)().weight
            assert torch.equal(ours[:n_old], theirs)
            torch.testing.assert_close(ours[n_old:], theirs.mean(0).expand(576 - n_old, -1))
        is_tied = model.lm_head.weight is model.get_input_embeddings().weight
        assert is_tied == lm.config.tie_word_embeddings


def test_a_padded_vocabulary_does_not_grow(parts: dict[str, Path], tmp_path: Path) -> None:
    lm = load_part(parts["llama"])
    lm.resize_token_embeddings(520)
    lm.save_pretrained(tmp_path / "lm")
    get_processor(parts["llama"]).save_pretrained(tmp_path / "lm")
    made = assemble_llava(
        parts["clip"], tmp_path / "lm", tmp_path / "out", image_token="<picture>", dtype="float32"
    )
    assert (made.image_token_id, made.new_rows) == (512, 0)
    kept = load_stock(tmp_path / "out").get_input_embeddings().weight
    assert torch.equal(kept, lm.get_input_embeddings().weight)


# ---------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("vision", "options", "n_tokens"),
    [
        ("clip", {}, 16),
        ("clip", {"vision_strategy": "full"}, 17),
        ("clip_vision", {"vision_layer": -4}, 16),
        ("siglip", {}, 16),
        ("siglip", {"vision_layer": 3}, 16),
    ],
)
def test_processors_agree_on_the_prompt_and_the_model_takes_it(
    assembled: Any, vision: str, options: dict[str, Any], n_tokens: int
) -> None:
    from transformers import AutoProcessor

    folder = assembled(vision, "qwen3", **options)
    image = tiny.random_image(90, 61)
    ours = get_processor(folder).encode(PICTURE_TURN, [image])
    stock = AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": [{"type": "image", "image": image}, PICTURE_TURN[0]["content"][1]]}]
    theirs = stock.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(ours.input_ids, theirs["input_ids"][0])
    assert torch.equal(ours.model_inputs["pixel_values"], theirs["pixel_values"])
    model = load_stock(folder)
    assert int(ours.vision_mask.sum()) == model.config.image_seq_length == n_tokens
    assert get_processor(folder).expected_image_tokens(61, 90) == n_tokens
    with torch.no_grad():
        assert torch.isfinite(model(**theirs).logits).all()


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_what_we_sample_has_the_log_probabilities_of_the_stock_model(assembled: Any, vision: str) -> None:
    model = load(assembled(vision, "llama"))
    for group in sample(model, make_groups(model, (1, 0, 2))):
        for rollout in group.rollouts:
            with torch.no_grad():
                wanted = plain_logprobs(model, group, rollout.response_ids)
            torch.testing.assert_close(rollout.sampler_logprobs, wanted, atol=1e-5, rtol=0)


def test_bfloat16_is_written_and_loads(assembled: Any) -> None:
    folder = assembled("clip", "mixtral", dtype="bfloat16")
    model = load_model(ModelConfig(model=str(folder)), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------- chat templates

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3_LIKE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == "user" and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if loop.index0 > ns.last_query %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3_LIKE = """\
{{- '<|begin|>' }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}

{#- The system message is taken out of the list. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nToday: " + date_string + "\\n\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|/header|>\\n\\n' }}
{%- endif %}
"""
NO_SYSTEM_TAKES_LISTS = (
    "\n  {%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}\n"
    "{% for m in messages %}\n  {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|turn|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|other|>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "qwen3": QWEN3_LIKE,
    "llama3": LLAMA3_LIKE,
    "takes_lists": NO_SYSTEM_TAKES_LISTS,
}


def render(template: str, turns: list[dict[str, Any]], **variables: Any) -> str:
    return _tokenizer().apply_chat_template(turns, chat_template=template, tokenize=False, **variables)


@cache
def _tokenizer() -> Any:
    return tiny.make_tokenizer()


@cache
def taught(name: str) -> str:
    return teach_images(TEMPLATES[name], _tokenizer(), "<image>")


texts = st.text(st.sampled_from(" \n\t{}%#'\"<|>abcé<image>"), max_size=12).map(lambda text: f"{text}x{text}")


@st.composite
def conversations(draw: Any, with_system: bool = True) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * draw(st.integers(0, 2)) + ["user"]
    roles = (["system"] if with_system and draw(st.booleans()) else []) + roles
    return [{"role": role, "content": draw(texts)} for role in roles]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(TEMPLATES)), prompt=st.booleans(), thinks=st.booleans())
def test_text_renders_exactly_as_before(data: Any, name: str, prompt: bool, thinks: bool) -> None:
    turns = data.draw(conversations(with_system=name != "takes_lists"))
    options = {"add_generation_prompt": prompt, "enable_thinking": thinks}
    assert render(taught(name), turns, **options) == render(TEMPLATES[name], turns, **options)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(TEMPLATES)))
def test_parts_render_like_the_string_they_stand_for(data: Any, name: str) -> None:
    turns = data.draw(conversations(with_system=name != "takes_lists"))
    as_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    where = data.draw(st.integers(0, 1))
    kind = data.draw(st.sampled_from(["image", "image_url"]))
    as_parts[-1]["content"].insert(where, {"type": kind})
    text = turns[-1]["content"]
    as_strings = [
        *turns[:-1],
        {"role": "user", "content": f"{text}<image>\n" if where else f"<image>\n{text}"},
    ]
    assert render(taught(name), as_parts, add_generation_prompt=True) == render(
        TEMPLATES[name], as_strings, add_generation_prompt=True
    )


def test_lists_of_text_render_as_before_where_a_template_takes_lists() -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": " b "}]}]
    assert render(taught("takes_lists"), turns) == render(TEMPLATES["takes_lists"], turns)
    assert "ab<|end|>" in render(taught("takes_lists"), turns)
    assert " a  b <|im_end|>" in render(taught("chatml"), turns)


def test_a_template_that_renders_images_stays_as_it_is() -> None:
    assert teach_images(tiny.LLAVA_TEMPLATE, _tokenizer(), "<image>") == tiny.LLAVA_TEMPLATE
    assert teach_images(tiny.LLAVA_TEMPLATE, _tokenizer(), "<picture>") != tiny.LLAVA_TEMPLATE


def test_other_fields_of_a_turn_and_turns_without_content_reach_the_template() -> None:
    turns = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}], "reasoning_content": "looking"},
    ]
    assert "<think>\nlooking\n</think>\n\nred" in render(taught("qwen3"), turns)
    call = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [1]}]
    assert render(taught("qwen3"), call) == render(TEMPLATES["qwen3"], call)


def test_a_video_is_refused_by_the_template() -> None:
    with pytest.raises(Exception, match="not video"):
        render(taught("chatml"), [{"role": "user", "content": [{"type": "video"}]}])


def test_every_named_template_is_taught_and_kept(parts: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoProcessor, AutoTokenizer

    load_part(parts["llama"]).save_pretrained(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(parts["llama"])
    tokenizer.chat_template = {"default": CHATML, "tool_use": LLAMA3_LIKE}
    tokenizer.save_pretrained(tmp_path / "lm")
    assemble_llava(parts["clip"], tmp_path / "lm", tmp_path / "out", dtype="float32")
    stock = AutoProcessor.from_pretrained(tmp_path / "out")
    assert stock.apply_chat_template(PICTURE_TURN) == (
        "<|im_start|>user\n<image>\nwhat is shown ?<|im_end|>\n"
    )
    assert "<image>" in stock.apply_chat_template(PICTURE_TURN, chat_template=stock.chat_template["tool_use"])
    assert get_processor(tmp_path / "out").template.source == stock.chat_template["default"]


# ---------------------------------------------------------------------- what is refused


def dino(folder: Path) -> Path:
    from transformers import Dinov2Config

    Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    return folder


def naflex(folder: Path) -> Path:
    from transformers import Siglip2Config

    Siglip2Config(vision_config={}, text_config={}).save_pretrained(folder)
    return folder


def without(source: Path, folder: Path, *names: str) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        if file.name not in names:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edited(source: Path, folder: Path, name: str, **changes: Any) -> Path:
    without(source, folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **changes}))
    return folder


def test_parts_that_do_not_fit_are_refused_with_what_to_do(parts: dict[str, Path], tmp_path: Path) -> None:
    crop = {"height": 42, "width": 42}
    small = edited(parts["clip"], tmp_path / "small", "preprocessor_config.json", crop_size=crop)
    hybrid = build_other_lm(tmp_path / "lfm", "Lfm2", layer_types=["conv", "full_attention"])
    recurrent = tmp_path / "mamba"
    build_mamba(recurrent)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"vision": dino(tmp_path / "dino")}, "dinov2 model.*CLIP or SigLIP.*siglip_vision_model"),
        ({"vision": naflex(tmp_path / "naflex")}, "NaFlex.*of type siglip"),
        ({"vision": parts["llama"]}, "is a llama model"),
        ({"vision": tmp_path / "nowhere"}, "vision tower: no model configuration"),
        ({"vision": small}, "images of 42 x 42 pixels.*56 x 56.*crop_size"),
        (
            {"vision": without(parts["clip"], tmp_path / "bare", "preprocessor_config.json")},
            "no image processor",
        ),
        ({"vision_layer": 4}, "vision_layer is 4, but .* has 3 layers"),
        ({"vision_layer": -5}, "-1 .the last. to -4"),
        ({"vision": parts["siglip"], "vision_strategy": "default"}, "no class token.*Use full"),
        ({"vision_strategy": "cls"}, "expected one of default, full"),
        ({"projector": "mlp3x"}, "expected one of mlp2x_gelu, linear"),
        ({"dtype": "float16"}, "expected one of bfloat16, float32"),
        ({"language": tiny.build_llava(tmp_path / "llava")}, "sees images already.*student.model="),
        ({"language": parts["clip_vision"]}, "no causal language model"),
        ({"language": hybrid}, "has conv layers.*cache of keys and values"),
        ({"language": recurrent}, "mamba.*linear_attention layers"),
        (
            {"language": tiny.build_text(tmp_path / "base", chat_template=None)},
            "no chat template.*chat_template.jinja",
        ),
        (
            {"language": edited(parts["llama"], tmp_path / "q", "config.json", quantization_config={})},
            "is quantized",
        ),
        ({"out": parts["clip"], "overwrite": True}, "is one of the parts"),
    ]
    for arguments, message in cases:
        given_parts = {
            "vision": parts["clip"],
            "language": parts["llama"],
            "out": tmp_path / "out",
            **arguments,
        }
        with pytest.raises(ConfigError, match=message):
            assemble_llava(**given_parts)
        assert not (tmp_path / "out").exists()


def test_an_embedding_tied_under_another_name_is_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    language = build_other_lm(tmp_path / "lm", "OPT", ffn_dim=64, word_embed_proj_dim=64)
    edited(language, tmp_path / "tied", "config.json", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="not called embed_tokens"):
        assemble_llava(parts["clip"], tmp_path / "tied", tmp_path / "out")


def build_mamba(folder: Path) -> None:
    from transformers import MambaConfig

    MambaConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(folder)


def test_missing_weights_are_refused_instead_of_being_random(parts: dict[str, Path], tmp_path: Path) -> None:
    deeper = json.loads((parts["siglip"] / "config.json").read_text())["vision_config"]
    deeper = edited(
        parts["siglip"], tmp_path / "deep", "config.json", vision_config={**deeper, "num_hidden_layers": 4}
    )
    with pytest.raises(ConfigError, match="lacks 16 weights of a SiglipVisionModel"):
        assemble_llava(deeper, parts["llama"], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "changes"),
    [("Gemma2", {"head_dim": 16}), ("Granite", {"logits_scaling": 4.0}), ("Phi", {})],
    ids=["capped", "scaled", "biased"],
)
def test_a_head_that_llava_would_not_reproduce_is_refused_and_nothing_is_overwritten(
    parts: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("an older model")
    language = build_other_lm(tmp_path / "lm", name, **changes)
    with pytest.raises(ConfigError, match="other logits on text"):
        assemble_llava(parts["siglip"], language, out, dtype="float32", overwrite=True)
    assert [file.name for file in out.iterdir()] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm", "out"]


# ---------------------------------------------------------------------- the script


def run_script(*arguments: object, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_needs_nothing_heavy() -> None:
    done = run_script("--help", options=("-X", "importtime"))
    assert done.returncode == 0 and "--vision-layer" in done.stdout
    assert "argparse" in done.stderr  # the imports are listed there
    assert "torch" not in done.stderr and "transformers" not in done.stderr


def test_the_script_says_what_it_made_and_refuses_to_overwrite(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ("--vision", parts["siglip"], "--language", parts["qwen3"], "--out", tmp_path / "out")
    done = run_script(*arguments, "--dtype", "float32", "--projector", "linear")
    assert done.returncode == 0, done.stderr[-2000:]
    for words in (
        "siglip_vision_model",
        "linear, seed 0",
        f"{TOKENS_OF_AN_IMAGE} tokens for 56 x 56",
        "<image> = 7",
    ):
        assert words in done.stdout
    assert f"student.model={tmp_path / 'out'}" in done.stdout.splitlines()[-1]
    with pytest.raises(ConfigError, match=r"not empty.*--overwrite"):
        assemble_llava(parts["clip"], parts["qwen3"], tmp_path / "out")
    assemble_llava(parts["clip"], parts["qwen3"], tmp_path / "out", overwrite=True)
    assert load_stock(tmp_path / "out").config.vision_config.model_type == "clip_vision_model"
    with pytest.raises(ConfigError, match="holds no model"):
        assemble_llava(parts["clip"], parts["qwen3"], tmp_path, overwrite=True)
