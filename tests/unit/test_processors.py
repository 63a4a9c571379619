"""What an adapter promises beyond parity with Hugging Face: counts, spans, markers, errors, tokens,
lightness."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, family
from families.internvl import TILE as INTERNVL_TILE
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from uniopd_mm.processors import (
    EncodedPrompt,
    ProcessorError,
    VLMProcessor,
    get_processor,
    register_processor,
)
from uniopd_mm.processors.images import to_rgb
from uniopd_mm.processors.llava import LlavaAdapter
from uniopd_mm.processors.qwen_vl import QwenVLAdapter

ROOT = Path(__file__).parents[2]
QWEN = tuple(name for name in FAMILIES if name.startswith("qwen"))
STRINGS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
)
# Hypothesis runs one test many times; the adapters it shares between runs keep no state.
examples = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        **{name: family(name).build(root / name) for name in FAMILIES},
        "text": tiny.build_text(root / "text"),
        "sentencepiece": tiny.build_text(
            root / "sentencepiece", family="llama", tokenizer=tiny.make_tokenizer(640, kind="byte_fallback")
        ),
    }


@pytest.fixture(scope="module")
def adapters(folders: dict[str, Path]) -> dict[str, VLMProcessor]:
    return {name: get_processor(folder) for name, folder in folders.items()}


@pytest.fixture(params=FAMILIES)
def seeing(request: pytest.FixtureRequest, adapters: dict[str, VLMProcessor]) -> VLMProcessor:
    return adapters[request.param]


def user(*parts: str | None) -> list[dict[str, Any]]:
    """One user turn; None is an image."""
    return [
        {
            "role": "user",
            "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts],
        }
    ]


A, B = tiny.random_image(90, 60, 1), tiny.random_image(40, 130, 2)


# ---- counts and spans


def count_placeholders(adapter: VLMProcessor, prompt: EncodedPrompt) -> int:
    return int((prompt.input_ids == adapter.image_token_id).sum())


def pieces_of(ids: torch.Tensor, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The ids of each span."""
    return [ids[start:end].tolist() for start, end in spans]


@examples
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_expected_image_tokens_is_what_encode_gives(seeing: VLMProcessor, width: int, height: int) -> None:
    assume(max(width, height) / min(width, height) <= 200)
    prompt = seeing.encode(user(None), [Image.new("RGB", (width, height))])
    assert count_placeholders(seeing, prompt) == seeing.expected_image_tokens(height, width)


@pytest.mark.parametrize("name", QWEN)
def test_pixel_bounds_are_those_asked_for(folders: dict[str, Path], name: str) -> None:
    side = 28 if name in ("qwen2_vl", "qwen2_5_vl") else 32
    square = side * side
    small = get_processor(folders[name], min_pixels=4 * square, max_pixels=6 * square)
    large = get_processor(folders[name], min_pixels=50 * square, max_pixels=80 * square)
    for adapter, (least, most) in ((small, (4, 6)), (large, (50, 80))):
        for size in ((20, 20), (300, 300), (200, 300)):
            assert least <= adapter.expected_image_tokens(*size) <= most
            prompt = adapter.encode(user(None), [Image.new("RGB", size[::-1])])
            assert count_placeholders(adapter, prompt) == adapter.expected_image_tokens(*size)
    with pytest.raises(ProcessorError, match="Set both"):
        get_processor(folders[name], min_pixels=50 * square, max_pixels=10)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "gemma3", "text"])
def test_pixel_bounds_that_would_do_nothing_are_an_error(folders: dict[str, Path], name: str) -> None:
    with pytest.raises(ProcessorError, match="max_pixels"):
        get_processor(folders[name], max_pixels=1000)


def test_spans_hold_all_of_an_image_and_nothing_else(seeing: VLMProcessor) -> None:
    prompt = seeing.encode(user("a", None, "b", None, "c"), [A, B])
    images, vision = pieces_of(prompt.input_ids, prompt.image_spans), seeing.vision_token_ids()
    assert len(images) == 2
    assert sum(image.count(seeing.image_token_id) for image in images) == count_placeholders(seeing, prompt)
    assert all(image[0] in vision and image[-1] in vision for image in images)
    outside = seeing.decode_tokens(seeing.strip_vision(prompt.input_ids))
    inside = "".join(seeing.decode_tokens([i for image in images for i in image if i not in vision]))
    inside = re.sub(r"<(row_\d+_col_\d+|global-img)>", "", inside)  # where they are no tokens of their own
    assert not inside.strip() and {"a", "b", "c"} <= {text.strip() for text in outside}
    marker = seeing.tokenizer.convert_tokens_to_ids(seeing.image_marker)
    assert pieces_of(prompt.collapsed_ids, prompt.collapsed_spans) == [[marker], [marker]]
    assert prompt.collapsed_ids.tolist().count(marker) == 2


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma3"])  # adds line breaks around
def test_expanding_the_collapsed_ids_gives_the_input_ids(
    adapters: dict[str, VLMProcessor], name: str
) -> None:
    prompt = adapters[name].encode(user(None, "a", None), [A, B])
    rebuilt, last = [], 0
    images = pieces_of(prompt.input_ids, prompt.image_spans)
    for (start, end), image in zip(prompt.collapsed_spans, images, strict=True):
        rebuilt += prompt.collapsed_ids[last:start].tolist() + image
        last = end
    assert rebuilt + prompt.collapsed_ids[last:].tolist() == prompt.input_ids.tolist()


def test_the_vision_mask_covers_start_and_end_tokens_and_nothing_else(
    adapters: dict[str, VLMProcessor],
) -> None:
    adapter = adapters["qwen2_5_vl"]
    prompt = adapter.encode(user("a", None, "b"), [A])
    (start, end), *_ = prompt.image_spans
    assert prompt.vision_mask.nonzero().flatten().tolist() == list(range(start - 1, end + 1))
    assert not adapter.encode(user("a")).vision_mask.any()


def test_stripping_vision_tokens_keeps_the_kind_and_the_rest(seeing: VLMProcessor) -> None:
    prompt = seeing.encode(user("a", None, "b"), [A])
    stripped = seeing.strip_vision(prompt.input_ids)
    assert torch.equal(stripped, prompt.input_ids[~prompt.vision_mask])
    assert seeing.strip_vision(prompt.input_ids.tolist()) == stripped.tolist()


# ---- pictures in the size that the model sees


def noise(width: int, height: int) -> Image.Image:
    """Any two ways to resize it differ."""
    return Image.frombytes("RGB", (width, height), random.Random(width).randbytes(3 * width * height))


def are_encoded_alike(adapter: VLMProcessor, one: Image.Image, other: Image.Image) -> bool:
    first, second = (adapter.encode(user("a", None), [image]) for image in (one, other))
    return torch.equal(first.input_ids, second.input_ids) and all(
        torch.equal(tensor, second.model_inputs[name]) for name, tensor in first.model_inputs.items()
    )


@settings(examples, max_examples=25)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_a_resized_image_is_encoded_as_the_image_itself_bit_for_bit(
    seeing: VLMProcessor, width: int, height: int
) -> None:
    assume(max(width, height) / min(width, height) <= 200)
    image = noise(width, height)
    resized = seeing.resize(image)
    assert are_encoded_alike(seeing, image, resized)
    assert resized.mode == "RGB"
    again = seeing.resize(resized)
    assert (again.size, again.tobytes()) == (resized.size, resized.tobytes())


SEEN_SIZES = {
    "llava": (56, 56),
    "llava_next": (90, 60),
    "llava_onevision": (90, 60),
    "qwen2_vl": (84, 56),
    "qwen2_5_vl": (84, 56),
    "qwen3_vl": (96, 64),
    "qwen3_5": (96, 64),
    "internvl": (90, 60),
    "gemma3": (56, 56),
    "gemma4": (120, 72),
    "idefics3": (64, 64),
    "smolvlm": (96, 64),
}
"""Width and height of what the families here make of 90 x 60 pixels; 90 x 60 where one picture is not enough."""


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_is_resized_to_what_the_model_sees(adapters: dict[str, VLMProcessor], name: str) -> None:
    assert adapters[name].resize(A).size == SEEN_SIZES[name]


def test_an_image_with_tiles_or_crops_of_its_own_keeps_its_size_and_others_do_not(tmp_path: Path) -> None:
    panning = get_processor(family("gemma3").build(tmp_path / "gemma3", pan_and_scan=True))
    tiling = family("internvl").build(tmp_path / "internvl")
    one_tile = get_processor(tiling, max_pixels=INTERNVL_TILE**2)
    for adapter, image, size in (
        (panning, noise(200, 60), (200, 60)),
        (panning, noise(65, 60), (56, 56)),
        (get_processor(tiling), noise(200, 60), (200, 60)),
        (one_tile, noise(200, 60), (INTERNVL_TILE, INTERNVL_TILE)),
    ):
        resized = adapter.resize(image)
        assert resized.size == size
        assert are_encoded_alike(adapter, image, resized)


def test_an_image_keeps_its_size_where_the_image_processor_would_resize_the_result_once_more(
    folders: dict[str, Path], adapters: dict[str, VLMProcessor]
) -> None:
    narrow = get_processor(folders["qwen2_5_vl"], min_pixels=28 * 28, max_pixels=2 * 28 * 28)
    wide = get_processor(folders["qwen2_5_vl"], max_pixels=400 * 28 * 28)
    for adapter, size in (
        (narrow, (700, 30)),  # becomes more placeholders than it may have
        (wide, (8200, 41)),  # becomes 293 : 1, which is refused
        (adapters["gemma4"], (120, 420)),  # 4 x 15 of 70 placeholders, which leaves room for a 16th row
    ):
        image = noise(*size)
        seen = adapter.expected_image_tokens(*size[::-1])
        assert adapter.resize(image).size == size
        assert seen == count_placeholders(adapter, adapter.encode(user(None), [image]))


def test_what_is_sent_is_upright_and_opaque_in_every_family(seeing: VLMProcessor) -> None:
    lying = A.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[0x0112] = 6  # to be turned clockwise
    see_through = B.convert("RGBA")
    see_through.putalpha(100)
    for image in (lying, see_through, B.convert("L")):
        resized = seeing.resize(image)
        assert resized.tobytes() == seeing.resize(to_rgb(image)).tobytes()
        assert resized.mode == "RGB"


def test_an_image_that_cannot_be_encoded_cannot_be_resized(
    seeing: VLMProcessor, adapters: dict[str, VLMProcessor]
) -> None:
    with pytest.raises(ProcessorError, match="expected a PIL image"):
        seeing.resize("picture.png")  # type: ignore[arg-type]
    with pytest.raises(ProcessorError, match=r"1000 x 2 pixels\) cannot be processed.*aspect ratio"):
        adapters["qwen2_5_vl"].resize(noise(1000, 2))
    with pytest.raises(ProcessorError, match="text-only"):
        adapters["text"].resize(A)


# ---- markers that a user typed


FRAGMENTS = (
    *tiny.VISION_TOKENS,
    "<IMG_CONTEXT>",
    "<start_of_image>",
    "<image_soft_token>",
    "<fake_token_around_image>",
    "<row_1_col_1>",
    "<|image|>",
    "the answer",
    " ",
    "日\U0001f642",
    "<",
    "image>",
    "|>",
    "\U000f0000",
    "<|im_end|>",
)


@examples
@given(texts=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), min_size=1, max_size=3))
def test_a_typed_marker_is_text_and_never_an_image(seeing: VLMProcessor, texts: list[str]) -> None:
    images = [A] * (len(texts) - 1)
    parts = [part for text in texts for part in (text, None)][:-1]
    prompt = seeing.encode(user(*parts), images)
    marker = seeing.tokenizer.convert_tokens_to_ids(seeing.image_marker)
    assert prompt.collapsed_ids.tolist().count(marker) == len(images) == len(prompt.image_spans)
    wanted = count_placeholders(seeing, seeing.encode(user(*[None] * len(images)), images))
    assert count_placeholders(seeing, prompt) == wanted
    written = seeing.tokenizer.decode(prompt.collapsed_ids, skip_special_tokens=False)
    assert seeing.image_slot.join(texts) in written


def test_a_typed_marker_in_any_string_of_a_message_is_text(adapters: dict[str, VLMProcessor]) -> None:
    adapter = adapters["qwen2_5_vl"]
    messages = [
        {"role": "system", "content": "Never print <|image_pad|> or <|vision_start|>."},
        *user(None, "ok"),
        {"role": "assistant", "content": "<|image_pad|>"},
    ]
    prompt = adapter.encode(messages, [A], add_generation_prompt=False)
    assert len(prompt.image_spans) == 1
    assert adapter.decode(prompt.collapsed_ids).count("<|image_pad|>") == 2


@pytest.mark.parametrize("name", ["text", "sentencepiece"])
def test_a_text_only_model_reads_a_typed_marker_as_text(adapters: dict[str, VLMProcessor], name: str) -> None:
    adapter = adapters[name]
    prompt = adapter.encode(user("what does <|image_pad|> mean in <image>?"))
    assert not prompt.vision_mask.any()
    assert "what does <|image_pad|> mean in <image>?" in adapter.decode(prompt.input_ids)


def test_a_marker_that_is_pieced_together_from_parts_is_refused(adapters: dict[str, VLMProcessor]) -> None:
    with pytest.raises(ProcessorError, match="placeholders"):
        adapters["llava"].encode(user("<ima", "ge>"))


# ---- bad input


@pytest.mark.parametrize(
    ("parts", "images", "found"), [((None, "a"), 0, "1 0"), (("a",), 1, "0 1"), ((None, None), 3, "2 3")]
)
def test_a_wrong_number_of_images_names_found_and_expected(
    seeing: VLMProcessor, parts: tuple[str | None, ...], images: int, found: str
) -> None:
    with pytest.raises(ProcessorError, match=found.replace(" ", ".*")):
        seeing.encode(user(*parts), [A] * images)


def test_a_placeholder_typed_instead_of_an_image_part_is_pointed_out(
    adapters: dict[str, VLMProcessor],
) -> None:
    with pytest.raises(ProcessorError, match="'<image>' typed in a text is only text"):
        adapters["llava"].encode(user("<image>\nwhat is it?"), [A])


def _truncated() -> Image.Image:
    data = BytesIO()
    tiny.random_image(200, 200).save(data, "PNG")
    return Image.open(BytesIO(data.getvalue()[:400]))


@pytest.mark.parametrize("bad", ["picture.png", None, b"\x89PNG", 3, "truncated"])
def test_a_bad_image_is_an_error_that_says_which(seeing: VLMProcessor, bad: Any) -> None:
    with pytest.raises(ProcessorError, match="Image 2 of 2"):
        seeing.encode(user(None, None), [A, _truncated() if bad == "truncated" else bad])


def test_an_image_that_llava_would_blow_up_before_the_crop_is_an_error(tmp_path: Path) -> None:
    adapter = get_processor(tiny.build_llava(tmp_path, image_size=336))
    with pytest.raises(ProcessorError, match="too large"):
        adapter.encode(user(None), [Image.new("RGB", (10000, 1))])


@pytest.mark.parametrize("name", QWEN)
def test_an_image_too_narrow_for_the_family_is_an_error(adapters: dict[str, VLMProcessor], name: str) -> None:
    with pytest.raises(ProcessorError, match="1000 x 2"):
        adapters[name].encode(user(None), [Image.new("RGB", (1000, 2))])
    with pytest.raises(ProcessorError, match="1000 x 2"):
        adapters[name].expected_image_tokens(2, 1000)


@pytest.mark.parametrize(
    "messages",
    [[], "hi", [{"content": "no role"}], [{"role": "user", "content": 3}], [*user("a"), "b"],
     [{"role": "user", "content": [{"type": "video"}]}], [{"role": "user", "content": [{"type": "text"}]}]],
)  # fmt: skip
def test_malformed_messages_are_errors(seeing: VLMProcessor, messages: Any) -> None:
    with pytest.raises(ProcessorError, match=r"expected"):
        seeing.encode(messages)


def test_a_text_only_model_refuses_images_and_says_what_to_do(adapters: dict[str, VLMProcessor]) -> None:
    with pytest.raises(ProcessorError, match="text_view"):
        adapters["text"].encode(user(None, "a"), [A])
    assert not adapters["text"].sees_images
    with pytest.raises(ProcessorError, match="text-only"):
        adapters["text"].expected_image_tokens(10, 10)


def test_a_tokenizer_without_chat_template_still_decodes_and_says_what_is_missing(tmp_path: Path) -> None:
    adapter = get_processor(tiny.build_text(tmp_path, chat_template=None))
    assert adapter.decode(adapter.tokenizer.encode("the answer")) == "the answer"
    assert adapter.stop_token_ids() == [adapter.tokenizer.eos_token_id]
    with pytest.raises(ProcessorError, match=r"chat_template\.jinja"):
        adapter.encode(user("a"))


def test_a_template_that_refuses_the_messages_is_an_error_with_its_words(tmp_path: Path) -> None:
    adapter = get_processor(
        tiny.build_text(tmp_path, chat_template="{{ raise_exception('no system turns, please') }}")
    )
    with pytest.raises(ProcessorError, match=r"roles: system, user\).*no system turns, please"):
        adapter.encode([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])


def test_a_config_whose_placeholder_is_no_added_token_is_an_error(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for source in folders["llava"].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_token_index": 300}))
    with pytest.raises(ProcessorError, match="image_token_id is 300"):
        get_processor(tmp_path)


def test_a_broken_torchvision_is_named_with_the_way_out(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(ProcessorError, match=r"nms does not exist.*pip uninstall torchvision"):
        get_processor(folders["llava"])
    assert get_processor(folders["text"]).encode(user("a")).input_ids.numel()


# ---- templates differ in the content they take


def test_text_reaches_templates_that_take_strings_only(tmp_path: Path) -> None:
    adapter = get_processor(tiny.build_text(tmp_path, chat_template=STRINGS_ONLY))
    as_parts = adapter.encode(user("the ", "answer"))
    as_string = adapter.encode([{"role": "user", "content": "the answer"}])
    assert as_parts.input_ids.tolist() == as_string.input_ids.tolist()
    assert "the answer" in adapter.decode(as_parts.input_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_reach_templates_of_text_models(name: str, tmp_path: Path) -> None:
    adapter = get_processor(family(name).build(tmp_path, chat_template=STRINGS_ONLY))
    prompt = adapter.encode(user(None, "what is <image>?"), [A])
    assert len(prompt.image_spans) == 1
    assert adapter.tokenizer.decode(prompt.collapsed_ids).endswith(  # after Gemma's <bos>
        f"<|im_start|>user\n{adapter.image_slot}what is <image>?<|im_end|>\n"
    )


def test_strings_reach_templates_that_take_parts_only(tmp_path: Path) -> None:
    parts_only = (
        "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] | selectattr('type', 'equalto', "
        "'image') %}<image>\n"
        "{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }} {% "
        "endfor %}{% endfor %}"
    )
    adapter = get_processor(tiny.build_llava(tmp_path, chat_template=parts_only))
    prompt = adapter.encode([{"role": "system", "content": "be brief"}, *user(None, "what?")], [A])
    assert adapter.tokenizer.decode(prompt.collapsed_ids) == "system: be brief user: <image>\nwhat? "


def test_template_variables_reach_the_template(folders: dict[str, Path]) -> None:
    plain, no_think = (
        get_processor(folders["text"]),
        get_processor(folders["text"], template={"enable_thinking": False}),
    )
    difference = no_think.decode(no_think.encode(user("a")).input_ids).removeprefix(
        plain.decode(plain.encode(user("a")).input_ids)
    )
    assert difference == "<think>\n\n</think>\n\n"


def test_openai_style_image_parts_are_images(adapters: dict[str, VLMProcessor]) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}
    assert len(adapters["llava"].encode([message], [A]).image_spans) == 1


# ---- the text view


def test_the_text_view_puts_each_description_where_its_image_was(adapters: dict[str, VLMProcessor]) -> None:
    messages = user("Compare", None, "with", None, "Which is larger?")
    view = adapters["llava"].text_view(messages, ["a red square", "a blue circle"])
    text = "".join(part["text"] for part in view[0]["content"])
    assert text == "Compare\na red square\nwith\na blue circle\nWhich is larger?"
    assert messages == user("Compare", None, "with", None, "Which is larger?"), (
        "the messages passed in are not changed"
    )
    assert adapters["text"].encode(view).input_ids.numel()


def test_an_empty_description_drops_the_image_without_a_trace(adapters: dict[str, VLMProcessor]) -> None:
    view = adapters["llava"].text_view(user(None, "What is 1 + 1?"), [""])
    assert view == user("What is 1 + 1?")


@pytest.mark.parametrize("texts", [[], ["a", "b"], "a"])
def test_the_text_view_needs_one_text_per_image(adapters: dict[str, VLMProcessor], texts: Any) -> None:
    with pytest.raises(ProcessorError, match="one text per image"):
        adapters["llava"].text_view(user(None), texts)


# ---- batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_may_mix_none_one_and_several_images_and_repeat_a_prompt(
    seeing: VLMProcessor, side: Any
) -> None:
    none, one, two = (
        seeing.encode(user("how many shapes?")),
        seeing.encode(user(None), [A]),
        seeing.encode(user(None, None, "?"), [A, B]),
    )
    prompts = [one, none, two, one]
    batch = seeing.collate(prompts, padding_side=side)
    for name in one.model_inputs.keys() - set(seeing.token_inputs):
        rows = iter(batch[name])
        for tensor in (item for p in (one, two, one) for item in p.model_inputs[name]):
            row = next(rows)
            assert torch.equal(row[tuple(slice(n) for n in tensor.shape)], tensor)
            assert row.abs().sum() == tensor.abs().sum()  # the rest of a row is padding
        assert next(rows, None) is None
    for row, prompt in enumerate(prompts):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == prompt.input_ids.tolist()
        assert real[-1 if side == "left" else 0] and int(real.sum()) == len(prompt.input_ids)
        assert (batch["input_ids"][row][~real] == seeing.pad_token_id).all()
        for name in seeing.token_inputs:
            assert batch[name][row][real].tolist() == prompt.model_inputs[name].tolist()
            assert not batch[name][row][~real].any()


def test_a_batch_without_images_has_no_vision_tensor(seeing: VLMProcessor) -> None:
    batch = seeing.collate([seeing.encode(user("a")), seeing.encode(user("the answer"))])
    assert batch.keys() == {"input_ids", "attention_mask", *seeing.token_inputs}


def test_bad_batches_are_errors(adapters: dict[str, VLMProcessor]) -> None:
    with pytest.raises(ProcessorError, match="no prompts"):
        adapters["llava"].collate([])
    with pytest.raises(ProcessorError, match="middle"):
        adapters["llava"].collate([adapters["llava"].encode(user("a"))], padding_side="middle")  # type: ignore[arg-type]


# ---- images


def test_images_are_turned_upright_by_their_exif_tag() -> None:
    image = tiny.random_image(40, 20)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    data = BytesIO()
    image.save(data, "JPEG", exif=exif)
    assert to_rgb(Image.open(data)).size == (20, 40)


def test_transparency_becomes_white() -> None:
    assert to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_rgb_images_pass_unchanged() -> None:
    assert to_rgb(A).tobytes() == A.tobytes()


# ---- the registry


def test_an_unknown_model_type_lists_the_known_ones_and_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_7_vl"}')
    with pytest.raises(
        ProcessorError, match=r"(?s)'qwen2_7_vl'.*llava, .*, qwen2_5_vl, .*nearest is 'qwen2_\w*vl'"
    ):
        get_processor(tmp_path)


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_folder_without_a_model_type_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ProcessorError, match="model_type"):
        get_processor(tmp_path)
    with pytest.raises(ProcessorError, match="no folder"):
        get_processor(tmp_path / "missing")


def test_the_family_is_read_from_the_config_not_from_the_path(tmp_path: Path) -> None:
    assert get_processor(tiny.build_qwen3_vl(tmp_path / "llava-1.5-7b")).model_type == "qwen3_vl"


def test_third_parties_can_register_and_take_over(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uniopd_mm.processors import registry

    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.delitem(registry._BUILT_IN, "qwen2_vl")

    @register_processor("qwen2_vl")
    class Mine(QwenVLAdapter):
        pass

    for source in folders["qwen2_5_vl"].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl"}))
    adapter = get_processor(tmp_path)
    assert type(adapter) is Mine
    assert isinstance(adapter.encode(user(None), [A]), EncodedPrompt)

    with pytest.raises(ProcessorError, match="replace=True"):
        register_processor("llava")(Mine)
    with pytest.raises(ProcessorError, match="subclass"):
        register_processor("other")(int)  # type: ignore[type-var]
    taken_over = register_processor("llava", replace=True)(type("Other", (LlavaAdapter,), {}))
    assert type(get_processor(folders["llava"])) is taken_over


# ---- files


@pytest.mark.parametrize("name", [*FAMILIES, "text", "sentencepiece"])
def test_a_saved_processor_encodes_as_before(
    folders: dict[str, Path], adapters: dict[str, VLMProcessor], name: str, tmp_path: Path
) -> None:
    options = {"max_pixels": 8 * 28 * 28} if name.startswith("qwen") else {}
    adapter = get_processor(folders[name], **options)
    adapter.save_pretrained(tmp_path)
    adapter.config.save_pretrained(tmp_path)
    messages, images = (user(None, "a"), [A]) if adapter.sees_images else (user("a"), [])
    before, after = adapter.encode(messages, images), get_processor(tmp_path).encode(messages, images)
    assert after.input_ids.tolist() == before.input_ids.tolist()
    for key, tensor in before.model_inputs.items():
        assert torch.equal(after.model_inputs[key], tensor)


WITHOUT_VIDEO = ("llava", "llava_next", "gemma3", "idefics3")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT_VIDEO])
def test_a_saved_folder_keeps_the_video_settings(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    get_processor(folders[name]).save_pretrained(tmp_path)
    assert (tmp_path / "video_preprocessor_config.json").exists()
    assert video_settings(tmp_path) == video_settings(folders[name])


def video_settings(folder: Path) -> dict[str, Any]:
    """As transformers finds them: in a file of their own, or among those of the images in older folders."""
    from transformers.video_processing_utils import BaseVideoProcessor

    settings, _ = BaseVideoProcessor.get_video_processor_dict(folder)
    return {key: value for key, value in settings.items() if not key.endswith("_processor_type")}


# ---- lightness


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY_MODULES = ("torch", "transformers", "deepspeed", "vllm", "numpy", "PIL", "tokenizers")
HEAVY = f"[m for m in {HEAVY_MODULES} if m in sys.modules]"


def test_importing_the_processors_loads_nothing_heavy() -> None:
    assert _run(f"import sys, uniopd_mm.processors; print({HEAVY})") == "[]"


def test_a_checkout_hands_out_one_set_of_modules_under_both_names() -> None:
    code = f"""
import sys
import processors.llava
import processors, uniopd_mm.processors, uniopd_mm.processors.llava
from processors.qwen_vl import QwenVLAdapter as a
from uniopd_mm.processors.qwen_vl import QwenVLAdapter as b
from processors import ProcessorError as c
from uniopd_mm.processors.errors import ProcessorError as d
same = [processors is uniopd_mm.processors, processors.llava is uniopd_mm.processors.llava, a is b, c is d]
print(same, {HEAVY})
"""
    assert _run(code) == "[True, True, True, True] []"
