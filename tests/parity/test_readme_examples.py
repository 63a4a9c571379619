"""The examples of processors/README.md are run; the family that one of them adds is held to its own processor."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from families.idefics3 import add_special_tokens
from PIL import Image

from uniopd_mm.processors import ProcessorError, VLMProcessor, get_processor, registry

README = Path(__file__).parents[2] / "processors" / "README.md"
SIDE = 28
"""Pixels of a token: 2 x 2 patches of 14."""
MISTRAL_TEMPLATE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}
        {%- set system_message = messages[0]['content'] %}
    {%- else %}
        {%- set system_message = messages[0]['content'][0]['text'] %}
    {%- endif %}
    {%- set loop_messages = messages[1:] %}
    {{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if message['content'] is string %}
            {{- '[INST]' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST]' }}
            {%- for block in message['content'] %}
                {%- if block['type'] == 'text' %}
                    {{- block['text'] }}
                {%- elif block['type'] in ['image', 'image_url'] %}
                    {{- '[IMG]' }}
                {%- else %}
                    {{- raise_exception('Only text and image blocks are supported in message content!') }}
                {%- endif %}
            {%- endfor %}
            {{- '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {%- if message['content'] is string %}
            {{- message['content'] + eos_token }}
        {%- else %}
            {{- message['content'][0]['text'] + eos_token }}
        {%- endif %}
    {%- else %}
        {{- raise_exception('Only user, system and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""


def build_mistral3(folder: Path) -> Path:
    """Pixtral tower -> patches merged two by two -> Mistral; images up to 112 pixels, 4 x 4 tokens."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tokens = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = add_special_tokens(tiny.make_tokenizer(), tokens)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    config = Mistral3Config(
        text_config={"model_type": "mistral", "head_dim": 16, **tiny._text_settings(tokenizer, 2, False)},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 112,
            "patch_size": 14,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    images = {
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": 14,
        "size": {"longest_edge": 112},
    }
    processor = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
    files = {"preprocessor_config.json": images, "processor_config.json": processor}
    return tiny._save(folder, Mistral3ForConditionalGeneration, config, tokenizer, MISTRAL_TEMPLATE, files, 0)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "Qwen/Qwen2.5-VL-": lambda folder: families.family("qwen2_5_vl").build(folder),
    "Qwen/Qwen3-VL-": lambda folder: families.family("qwen3_vl").build(folder),
    "llava-hf/llava-1.5-": lambda folder: families.family("llava").build(folder),
    "mistralai/": build_mistral3,
    "Qwen/Qwen3-": tiny.build_text,
}
"""How a hub id in the README begins -> the tiny model that stands for it here."""


def with_tiny_models(code: str, root: Path) -> str:
    def folder_of(match: re.Match[str]) -> str:
        model_id = match[1]
        build = next((build for start, build in BUILDERS.items() if model_id.startswith(start)), None)
        assert build, f"The README names {model_id}; give it a tiny model in BUILDERS."
        folder = root / model_id.replace("/", "--")
        return repr(str(folder if folder.exists() else build(folder)))

    return re.sub(r'"([\w.-]+/[\w.-]+)"', folder_of, code)


def python_blocks() -> Iterator[tuple[int, str]]:
    """Line of the file, code."""
    text = README.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start(1)), match[1]


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the README's Python has defined, all blocks run in order; what it has registered goes again."""
    names: dict[str, Any] = {"image": tiny.random_image(90, 60)}
    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_registered", dict(registry._registered))
        for line, code in python_blocks():  # tracebacks show the line of the README
            exec(compile("\n" * line + with_tiny_models(code, root), str(README), "exec"), names)
        yield names


@pytest.fixture(scope="module")
def mistral3(after_readme: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert "mistral3" in registry._registered, "The README has no block with @register_processor('mistral3')."
    return build_mistral3(tmp_path_factory.mktemp("mistral3"))


def reference(folder: Path) -> Any:
    """PixtralProcessor on the files of a folder.  Without torchvision transformers hides it, for a function that its
    module takes from the torchvision half of the image processor; the Pillow half has the same one."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    if util.find_spec("torchvision"):
        return AutoProcessor.from_pretrained(folder)
    package = "transformers.models.pixtral"
    with pytest.MonkeyPatch.context() as patch:
        pillow_half = importlib.import_module(f"{package}.image_processing_pil_pixtral")
        patch.setitem(sys.modules, f"{package}.image_processing_pixtral", pillow_half)
        processor_class = importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
    settings = json.loads((folder / "processor_config.json").read_text())
    return processor_class(
        AutoImageProcessor.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(),
        **{name: settings[name] for name in ("patch_size", "spatial_merge_size")},
    )


def turn(role: str, *parts: Any) -> dict[str, Any]:
    """Strings are text, images are images."""
    content = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts
    ]
    return {"role": role, "content": content}


def encode(adapter: VLMProcessor, messages: list[dict[str, Any]]) -> Any:
    images = [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]
    return adapter.encode(messages, images)


A, B, C = tiny.random_image(64, 64, 1), tiny.random_image(200, 40, 2), tiny.random_image(33, 130, 3)
CONVERSATIONS = {
    "text only": [turn("user", "what is the answer?")],
    "one image": [turn("user", A, "what colour is the square?")],
    "images of different size": [turn("user", A, "above", B, "below", C)],
    "system and several turns": [
        turn("system", "answer in one word."),
        turn("user", C, "how many?"),
        turn("assistant", "two"),
        turn("user", "and here? ", B),
    ],
    **{
        f"{width} x {height}": [turn("user", tiny.random_image(width, height), "?")]
        for width, height in ((1, 1), (28, 29), (57, 13), (300, 20), (640, 480), (1000, 1000))
    },
}


def test_every_python_block_of_the_readme_runs(after_readme: dict[str, Any]) -> None:
    assert len(list(python_blocks())) >= 2


def test_a_family_is_added_in_fewer_than_40_lines(mistral3: Path) -> None:
    (code,) = [code for _, code in python_blocks() if '@register_processor("mistral3")' in code]
    assert len(code.splitlines()) < 40


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_added_family_gives_what_its_own_processor_gives(mistral3: Path, name: str) -> None:
    messages = CONVERSATIONS[name]
    expected = reference(mistral3).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt = encode(get_processor(mistral3), messages)
    assert prompt.input_ids.tolist() == expected.pop("input_ids")[0].tolist()
    expected.pop("attention_mask")
    assert prompt.model_inputs.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(prompt.model_inputs[key], tensor), key


def test_its_batches_are_those_of_its_own_processor_and_the_model_takes_them(mistral3: Path) -> None:
    from transformers import AutoModelForImageTextToText

    adapter, theirs = get_processor(mistral3), reference(mistral3)
    batch = [CONVERSATIONS[name] for name in ("images of different size", "text only", "one image")]
    prompts = [encode(adapter, messages) for messages in batch]
    theirs.tokenizer.padding_side = "left"
    expected = theirs.apply_chat_template(
        batch, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    ours = adapter.collate(prompts)
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(ours[key], tensor), key
    model = AutoModelForImageTextToText.from_pretrained(mistral3).eval()
    with torch.no_grad():
        together = model(**ours).logits[:, -1]
        alone = torch.stack([model(**adapter.collate([prompt])).logits[0, -1] for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_its_spans_cover_rows_and_end_and_its_counts_are_arithmetic(mistral3: Path) -> None:
    adapter = get_processor(mistral3)
    for size in ((1, 1), (28, 28), (29, 28), (200, 40), (33, 130), (1000, 1000)):
        prompt = encode(adapter, [turn("user", "a", tiny.random_image(*size), "b")])
        ((start, end),) = prompt.image_spans
        placeholders = int((prompt.input_ids == adapter.image_token_id).sum())
        rows = end - start - placeholders
        assert prompt.vision_mask.nonzero().flatten().tolist() == list(range(start, end))
        assert placeholders == adapter.expected_image_tokens(size[1], size[0]) and placeholders % rows == 0


def test_its_own_vision_tokens_are_text_when_typed_and_never_sampled(mistral3: Path) -> None:
    adapter = get_processor(mistral3)
    typed = "[IMG] and [IMG_BREAK] and [IMG_END]"
    prompt = encode(adapter, [turn("user", typed)])
    assert not prompt.vision_mask.any() and typed in adapter.decode(prompt.input_ids)
    tokens = adapter.tokenizer.convert_ids_to_tokens(adapter.suppress_token_ids())
    assert {"[IMG]", "[IMG_BREAK]", "[IMG_END]"} <= set(tokens)


def test_its_pixel_bounds_hold_or_are_an_error(mistral3: Path) -> None:
    adapter = get_processor(mistral3, max_pixels=9 * SIDE * SIDE + 100)
    for size in ((500, 500), (500, 20), (60, 60)):
        pixels = encode(adapter, [turn("user", Image.new("RGB", size))]).model_inputs["image_sizes"].prod()
        assert SIDE * SIDE <= int(pixels) <= 9 * SIDE * SIDE
    for bounds in ({"max_pixels": SIDE * SIDE - 1}, {"min_pixels": 100}, {"max_pixels": 0}):
        with pytest.raises(ProcessorError, match="max_pixels from 784 on"):
            get_processor(mistral3, **bounds)


def test_its_saved_folder_loads_as_its_own_processor(mistral3: Path, tmp_path: Path) -> None:
    adapter = get_processor(mistral3)
    adapter.save_pretrained(tmp_path)
    adapter.config.save_pretrained(tmp_path)
    messages = CONVERSATIONS["images of different size"]
    saved = reference(tmp_path).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt = encode(adapter, messages)
    assert prompt.input_ids.tolist() == saved["input_ids"][0].tolist()
    assert torch.equal(prompt.model_inputs["pixel_values"], saved["pixel_values"])


def test_a_shape_that_it_cannot_resize_is_an_error(mistral3: Path) -> None:
    with pytest.raises(ProcessorError, match="10000 x 1 pixels"):
        encode(get_processor(mistral3), [turn("user", Image.new("RGB", (10_000, 1)))])
