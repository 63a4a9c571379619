"""Every adapter against its family's own Hugging Face processor: the same ids and the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from families import FAMILIES
from PIL import Image

from uniopd_mm.processors import VLMProcessor, get_processor

# The published template of Qwen3, without its tool-call branches.
QWEN_3_TEMPLATE = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


@dataclass(frozen=True)
class Family:
    adapter: VLMProcessor
    reference: Any
    """The family's own processor."""
    load_reference: Callable[[Path], Any]


VARIANTS = (*FAMILIES, "llava, SentencePiece", "gemma3, pan and scan")


@pytest.fixture(scope="module", params=VARIANTS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    name, _, variant = request.param.partition(", ")
    module = families.family(name)
    options = {"chat_template": module.CHAT_TEMPLATE}
    if variant == "pan and scan":
        options["pan_and_scan"] = True
    elif variant == "SentencePiece":
        options["tokenizer"] = _with_start_token(tiny.make_tokenizer(640, kind="byte_fallback"))
    folder = module.build(tmp_path_factory.mktemp("model"), **options)
    return Family(get_processor(folder), module.reference(folder), module.reference)


def _with_start_token(tokenizer: Any) -> Any:
    """Like Llama 2: the tokenizer itself puts a start token before every text."""
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    return tokenizer


def user(*parts: Any) -> dict[str, Any]:
    """A user turn; strings are text, images are images."""
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}
            for p in parts
        ],
    }


def says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _odd_modes() -> dict[str, Image.Image]:
    colour = tiny.random_image(70, 50, seed=4)
    see_through = colour.convert("RGBA")
    see_through.putalpha(tiny.random_image(70, 50, seed=5).convert("L"))
    return {
        "RGBA": see_through,
        "greyscale": colour.convert("L"),
        "greyscale with alpha": see_through.convert("LA"),
        "palette": colour.quantize(16),
        "black and white": colour.convert("1"),
        "CMYK": colour.convert("CMYK"),
        "animated": _reopened(colour, "GIF", save_all=True, append_images=[colour.rotate(180)]),
    }


def _reopened(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    data = BytesIO()
    image.save(data, kind, **options)
    return Image.open(data)


A, B, C = tiny.random_image(64, 64, 1), tiny.random_image(200, 40, 2), tiny.random_image(33, 130, 3)
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text only": [user("what is the answer?")],
    "one image": [user(A, "what colour is the square?")],
    "image after the text": [user("look: ", A)],
    "two images of different size": [user(A, "above", B, "below")],
    "three images without text": [user(A, B, C)],
    "multi-turn with images in both turns": [
        user(C, "how many?"),
        says("assistant", "the answer is 2."),
        user("and of this?", A),
    ],
    "system prompt": [says("system", "answer in one word."), user(B, "what is it?")],
    "empty text": [user(A, "")],
    "no text at all": [user("")],
    "emoji and CJK": [user("\U0001f642 日本語 и ещё ", A, "图中有几个三角形。\n\n\t1 + 1")],
    "special tokens in the text": [user("a<|im_end|>\n<|im_start|>system\nb", A)],
    **{f"{mode} image": [user(image, "what is it?")] for mode, image in _odd_modes().items()},
}


def images_of(messages: list[dict[str, Any]]) -> list[Image.Image]:
    return [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_tensors_equal_those_of_the_familys_own_processor(
    family: Family, name: str, add_generation_prompt: bool
) -> None:
    messages = CONVERSATIONS[name]
    expected = family.reference.apply_chat_template(
        messages,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    prompt = family.adapter.encode(messages, images_of(messages), add_generation_prompt=add_generation_prompt)

    assert prompt.input_ids.tolist() == expected.pop("input_ids")[0].tolist()
    expected.pop("attention_mask")
    for key in family.adapter.token_inputs:
        expected[key] = expected[key][0]
    assert prompt.model_inputs.keys() == expected.keys()
    for key, tensor in expected.items():
        assert prompt.model_inputs[key].dtype == tensor.dtype
        assert torch.equal(prompt.model_inputs[key], tensor), key


@pytest.mark.parametrize(
    "size", [(1, 1), (28, 28), (57, 13), (300, 20), (640, 480), (480, 640), (1000, 1000), (4000, 3000)]
)
def test_images_of_any_size_equal_those_of_the_familys_own_processor(
    family: Family, size: tuple[int, int]
) -> None:
    messages = [user(tiny.random_image(*size), "what is it?")]
    expected = family.reference.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt = family.adapter.encode(messages, images_of(messages), add_generation_prompt=False)
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert torch.equal(prompt.model_inputs["pixel_values"], expected["pixel_values"])


def test_a_file_is_turned_upright_as_the_familys_own_processor_turns_it(
    family: Family, tmp_path: Path
) -> None:
    image, file = tiny.random_image(120, 60), tmp_path / "on_its_side.jpg"
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, exif=exif)
    by_path = [{"role": "user", "content": [{"type": "image", "path": str(file)}]}]
    expected = family.reference.apply_chat_template(
        by_path, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt = family.adapter.encode([user(image)], [Image.open(file)], add_generation_prompt=False)
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert torch.equal(prompt.model_inputs["pixel_values"], expected["pixel_values"])


def test_a_batch_equals_the_batch_of_the_familys_own_processor(family: Family) -> None:
    names = ["two images of different size", "text only", "multi-turn with images in both turns", "one image"]
    batch = [CONVERSATIONS[name] for name in names]
    family.reference.tokenizer.padding_side = "left"
    expected = family.reference.apply_chat_template(
        batch, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    got = family.adapter.collate([family.adapter.encode(m, images_of(m)) for m in batch], padding_side="left")
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.startswith("pixel") and len(tensor) > len(got[key]):
            # Idefics3 and SmolVLM give prompts without images blank tiles, which their models drop again.
            has_image = torch.tensor([bool(images_of(conversation)) for conversation in batch])
            assert not tensor[~has_image].any()
            tensor = tensor[has_image]
        assert torch.equal(got[key], tensor), key


def test_the_saved_processor_loads_as_the_familys_own(family: Family, tmp_path: Path) -> None:
    family.adapter.save_pretrained(tmp_path)
    family.adapter.config.save_pretrained(tmp_path)  # AutoProcessor finds the family by config.json
    messages = CONVERSATIONS["multi-turn with images in both turns"]
    saved = family.load_reference(tmp_path).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt = family.adapter.encode(messages, images_of(messages), add_generation_prompt=False)
    assert prompt.input_ids.tolist() == saved["input_ids"][0].tolist()
    assert torch.equal(prompt.model_inputs["pixel_values"], saved["pixel_values"])


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("build_family", ["qwen3", "llama"])
def test_text_models_equal_their_tokenizers_chat_template(
    build_family: str, variables: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tiny.build_text(tmp_path, family=build_family, chat_template=QWEN_3_TEMPLATE)
    adapter, tokenizer = get_processor(folder, template=variables), AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "answer in one word."},
        {"role": "user", "content": "日本 \U0001f642 how many?"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\n2"},
        {"role": "user", "content": ""},
    ]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, **variables
    )
    prompt = adapter.encode(messages)
    assert prompt.input_ids.tolist() == expected["input_ids"]
    assert prompt.collapsed_ids.tolist() == expected["input_ids"]
    assert prompt.model_inputs == {}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_takes_a_mixed_batch_and_gives_every_prompt_its_own_logits(
    name: str, side: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    folder = families.family(name).build(tmp_path)
    adapter, model = get_processor(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    names = ["text only", "two images of different size", "one image"]
    prompts = [adapter.encode(CONVERSATIONS[name], images_of(CONVERSATIONS[name])) for name in names]
    batch = adapter.collate(prompts, padding_side=side)
    last = batch["attention_mask"].cumsum(-1).argmax(-1)
    with torch.no_grad():
        together = model(**batch).logits[torch.arange(len(prompts)), last]
        alone = torch.stack([model(**adapter.collate([prompt])).logits[0, -1] for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
