"""The adapter every family shares: messages and images in, token ids, masks and model tensors out.

P = prompt tokens with every image expanded to its placeholders, C = with one marker per image,
B = prompts.  What a family fills in is marked "family" below; README.md has the checklist.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from uniopd_mm.processors import chat
from uniopd_mm.processors.errors import ProcessorError
from uniopd_mm.processors.images import (
    are_equal,
    require_working_torchvision,
    to_picture,
    to_rgb,
    to_rgb_all,
)
from uniopd_mm.processors.tokens import encode_as_plain_text, find_vision_tokens, split_decode

if TYPE_CHECKING:
    from typing import Self

    from PIL.Image import Image
    from torch import Tensor

Span = tuple[int, int]
"""[start, end) in token positions."""

_CONFIG_VISION_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
VIDEO_FILE = "video_preprocessor_config.json"
_SUB_PROCESSORS = ("chat_template", "tokenizer", "image_processor", "video_processor")


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """One prompt as a model takes it."""

    input_ids: Tensor
    """[P] int64, placeholders expanded."""
    vision_mask: Tensor
    """[P] bool, True at every vision token: placeholders, image start and end, video."""
    model_inputs: dict[str, Tensor]
    """The model's other inputs by argument name: [P], or images or patches on dim 0 (``pixel_values``)."""
    collapsed_ids: Tensor
    """[C] int64, one marker per image as the chat template writes it: what inference servers take beside the
    pictures."""
    image_spans: tuple[Span, ...]
    """Where each image lies in ``input_ids``: from the first to the last of its vision tokens.  Its placeholders,
    and in some families start, end and row tokens among them."""
    collapsed_spans: tuple[Span, ...]
    """Each image's marker in ``collapsed_ids``."""


class VLMProcessor:
    """Adapter of one model family; agrees token for token with the family's own Hugging Face processor.

    One difference is on purpose: a vision marker such as ``<image>`` that somebody typed in a text is
    encoded as those characters, never as an image.
    """

    sees_images: ClassVar[bool] = True
    token_inputs: ClassVar[tuple[str, ...]] = ()
    """family: names of the model inputs of shape [P], padded with 0 by :meth:`collate`."""
    vision_tokens: ClassVar[tuple[str, ...]] = ()
    """family: vision tokens beside those that config.json names and tokens.KNOWN_VISION_TOKENS lists."""
    processor_classes: ClassVar[Mapping[str, str]] = {}
    """family: model type -> name of its Hugging Face processor class, written by :meth:`save_pretrained`."""

    image_processor: Any
    """family: the Hugging Face image processor, if it has one."""

    def __init__(
        self,
        path_or_id: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        revision: str | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        if self.sees_images:
            require_working_torchvision()
        from transformers import AutoConfig, AutoTokenizer

        self.path = str(path_or_id)
        self.hub: dict[str, Any] = {} if revision is None else {"revision": revision}
        try:
            self.config = AutoConfig.from_pretrained(self.path, **self.hub)
        except ImportError:  # some configs import torchvision, if it is there, and say another thing
            require_working_torchvision()
            raise
        self.model_type: str = self.config.model_type
        self.tokenizer = AutoTokenizer.from_pretrained(self.path, **self.hub)
        settings = self.read_processor_files() if self.sees_images else {}
        self.processor_settings = {key: settings[key] for key in settings if key not in _SUB_PROCESSORS}
        config_ids = [getattr(self.config, name, None) for name in _CONFIG_VISION_IDS]
        self._vision = find_vision_tokens(self.tokenizer, config_ids, self.vision_tokens)
        self.image_token_id: int | None = self._find_image_token() if self.sees_images else None
        source = settings.get("chat_template") or self.tokenizer.chat_template
        if isinstance(source, Mapping):  # several named templates
            source = source.get("default")
        self.template = chat.ChatTemplate(self.tokenizer, source, template or {}, self.image_slot)
        self._stop_ids = self._find_stop_ids()
        self.load_image_processor(min_pixels, max_pixels)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **options: Any) -> VLMProcessor:
        """Adapter from a model folder or hub id; options as in :func:`get_processor`."""
        return cls(path_or_id, **options)

    def with_template(self, variables: Mapping[str, Any]) -> Self:
        """The same processor with more variables of the chat template; its own win.  Templates ignore what they do not
        know."""
        changed = copy.copy(self)
        merged = {**variables, **self.template.variables}
        changed.template = chat.ChatTemplate(self.tokenizer, self.template.source, merged, self.image_slot)
        return changed

    # ---- family: what differs between families

    @property
    def image_slot(self) -> str:
        """family: what stands for an image in a chat template that knows no image parts."""
        return self.image_marker

    @property
    def image_marker(self) -> str:
        """family: the one token that the chat template writes for an image; the placeholder, unless told."""
        return self.image_token

    def load_image_processor(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """family: set up what :meth:`process_images` needs, from ``self.path`` and ``self.hub``."""
        raise NotImplementedError

    def process_images(self, images: list[Image]) -> tuple[dict[str, Tensor], list[str]]:
        """family: model inputs of the RGB images of one prompt, and the text that takes the place of each
        marker, placeholders included.  Lone ValueErrors (a shape it cannot resize) become ProcessorErrors."""
        raise NotImplementedError

    def expected_image_tokens(self, height: int, width: int) -> int:
        """family: placeholders of an upright image of this size in pixels, alone in its prompt; what
        :meth:`encode` gives, without running the image through."""
        raise NotImplementedError

    def resize_image(self, image: Image) -> Image | None:
        """family: an upright RGB image as the image processor resizes and crops it, before it cuts patches and
        normalises; :meth:`processed_picture` is that for one fixed size.  None, unless told, where one picture cannot
        hold what the model sees, as with tiles beside a view of the whole."""
        return None

    def make_token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """family: the [P] model inputs named in ``token_inputs``; 1 at image placeholders, unless told."""
        return {name: (input_ids == self.image_token_id).long() for name in self.token_inputs}

    def join_vision(self, name: str, tensors: list[Tensor]) -> Tensor:
        """family: one vision input of several prompts as a batch; one behind the other on dim 0, unless told."""
        import torch

        return torch.cat(tensors)

    def position_ids(self, batch: Mapping[str, Tensor]) -> Tensor:
        """family: positions [B, P] int64 of a collated batch, counted from the first real token, 0 at padding;
        [3, B, P] (time, height, width) for models with M-RoPE."""
        mask = batch["attention_mask"]
        return (mask.cumsum(-1) - 1).clamp(min=0)

    def write_image_files(self, folder: Path) -> None:
        """family: the image processor's files, as from_pretrained reads them."""
        raise NotImplementedError

    # ---- prompts

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Image] = (),
        add_generation_prompt: bool = True,
    ) -> EncodedPrompt:
        """Chat turns and their PIL images (the k-th image part is ``images[k]``) as one prompt."""
        import torch

        turns = chat.check_messages(messages)
        pictures = self._check_images(turns, images)
        tensors, texts = self._process(pictures)
        hidden, stand_ins = chat.hide_markers(turns, tuple(self._vision))
        rendered = self.template.render(hidden, add_generation_prompt)
        marker = self.image_marker if self.sees_images else None
        pieces = [rendered] if marker is None else rendered.split(marker)
        if len(pieces) != len(pictures) + 1:
            raise ProcessorError(
                f"The chat template of {self.path} made {len(pieces) - 1} image placeholders ({marker}) of "
                f"{len(pictures)} images; it must make one for each.  Check chat_template.jinja, and texts that "
                "spell the placeholder in pieces."
            )
        collapsed, collapsed_spans = self._tokenize(pieces, [marker] * len(pictures), stand_ins)
        expanded, spans = self._tokenize(pieces, texts, stand_ins)
        input_ids = torch.tensor(expanded, dtype=torch.int64)
        return EncodedPrompt(
            input_ids=input_ids,
            vision_mask=torch.isin(input_ids, torch.tensor(self.suppress_token_ids(), dtype=torch.int64)),
            model_inputs={**tensors, **self.make_token_inputs(input_ids)},
            collapsed_ids=torch.tensor(collapsed, dtype=torch.int64),
            image_spans=spans,
            collapsed_spans=collapsed_spans,
        )

    def resize(self, image: Image) -> Image:
        """The image upright, in RGB and in the size in which the model sees it: what to send to a server, which may
        resize with another library and get other pixels.

        ``encode`` makes the same tokens and tensors of it as of ``image``, bit for bit, and ``resize`` leaves it as
        it is.  Where there is no such picture (:meth:`resize_image` knows none, or the image processor would resize
        it once more) the image keeps its size.
        """
        if not self.sees_images:
            raise ProcessorError(f"{self.path} ({self.model_type}) is text-only: it resizes no images.")
        picture = to_rgb(image)
        try:
            resized = self.resize_image(picture)
        except ValueError as error:
            raise ProcessorError(f"{_sizes([picture])} cannot be processed: {error}") from error
        return picture if resized is None or not self._leaves(resized) else resized

    def collate(
        self, prompts: Sequence[EncodedPrompt], padding_side: Literal["left", "right"] = "left"
    ) -> dict[str, Tensor]:
        """One batch: input_ids and attention_mask [B, longest P] int64, [P] inputs padded with 0, vision
        tensors of all prompts in order on dim 0.  A vision tensor is absent when no prompt has an image."""
        import torch

        if not prompts:
            raise ProcessorError("collate got no prompts; expected at least one EncodedPrompt.")
        if padding_side not in ("left", "right"):
            raise ProcessorError(f"padding_side is {padding_side!r}; expected 'left' or 'right'.")
        batch = {
            "input_ids": _pad([p.input_ids for p in prompts], self.pad_token_id, padding_side),
            "attention_mask": _pad([torch.ones_like(p.input_ids) for p in prompts], 0, padding_side),
        }
        names = dict.fromkeys(name for prompt in prompts for name in prompt.model_inputs)
        for name in names:
            if name in self.token_inputs:
                batch[name] = _pad([p.model_inputs[name] for p in prompts], 0, padding_side)
            else:
                batch[name] = self.join_vision(
                    name, [p.model_inputs[name] for p in prompts if name in p.model_inputs]
                )
        return batch

    def text_view(self, messages: Sequence[Mapping[str, Any]], image_text: Sequence[str]) -> chat.Turns:
        """Messages for a reader without eyes: the k-th image part becomes ``image_text[k]``, "" drops it."""
        return chat.replace_images(messages, image_text)

    # ---- tokens

    def vision_token_ids(self) -> frozenset[int]:
        """Every id that stands for vision (placeholder, image start and end, video), whoever the model is."""
        return frozenset(self._vision.values())

    def suppress_token_ids(self) -> list[int]:
        """Ids a model must never sample: a sampled placeholder makes the next forward pass miss an image."""
        return sorted(self._vision.values())

    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer, the template's end of turn first."""
        return list(self._stop_ids)

    def strip_vision(self, ids: Any) -> Any:
        """The same ids (list, or tensor of one dimension) without vision tokens."""
        vision = self.vision_token_ids()
        if isinstance(ids, list | tuple):
            return type(ids)(token for token in ids if token not in vision)
        import torch

        unwanted = torch.tensor(self.suppress_token_ids(), dtype=ids.dtype, device=ids.device)
        return ids[~torch.isin(ids, unwanted)]

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's pad token, else the stop token (the attention mask tells them apart)."""
        if self.tokenizer.pad_token_id is not None:
            return self.tokenizer.pad_token_id
        return self._stop_ids[0] if self._stop_ids else 0

    def decode(self, ids: Any) -> str:
        """Text of these ids without special tokens."""
        ids = _as_list(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_tokens(self, ids: Any) -> list[str]:
        """One string per token, special tokens kept; joined, the decoded whole.  A character made of several
        tokens belongs to the last of them; bytes that are no UTF-8 show as U+FFFD."""
        return split_decode(self.tokenizer, _as_list(ids))

    # ---- files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer, chat template and image processor as get_processor and AutoProcessor read them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = self.template.source
        tokenizer.save_pretrained(folder)
        if self.sees_images:
            name = self.processor_classes.get(self.model_type)
            named = {"processor_class": name} if name else {}
            write_json(folder / "processor_config.json", {**named, **self.processor_settings})
            self.write_image_files(folder)

    def write_video_settings(self, folder: Path, video_processor_type: str, shared: Sequence[str]) -> None:
        """The model's own video settings, without which AutoProcessor and servers refuse the saved folder.  A model
        folder may have none: then the family's video processor with the ``shared`` settings of images."""
        settings = self.read_video_settings()
        if "video_processor_type" not in settings:
            images = self.image_processor.to_dict()
            settings = {
                "video_processor_type": video_processor_type,
                **{name: images[name] for name in shared},
            }
        write_json(folder / VIDEO_FILE, settings)

    # ---- steps

    def read_video_settings(self) -> dict[str, Any]:
        """As transformers finds them: in processor_config.json, in a file of their own, or in older folders among
        the settings of images; {} if there are none of either."""
        from transformers.video_processing_utils import BaseVideoProcessor

        try:
            return BaseVideoProcessor.get_video_processor_dict(self.path, **self.hub)[0]
        except OSError:
            return {}

    def read_processor_files(self) -> dict[str, Any]:
        """processor_config.json and the processor's chat template, as Hugging Face joins them; {} if none."""
        from transformers import ProcessorMixin

        return ProcessorMixin.get_processor_dict(self.path, **self.hub)[0]

    @property
    def image_token(self) -> str:
        """The placeholder, as text."""
        return self.tokenizer.convert_ids_to_tokens(self.image_token_id)

    def fill_processor_settings(self, defaults: Mapping[str, Any]) -> None:
        """``defaults`` for what processor_config.json leaves out or empty, as old folders do."""
        given = {key: value for key, value in self.processor_settings.items() if value is not None}
        self.processor_settings = {**defaults, **given}

    def processed_picture(self, image: Image) -> Image:
        """The one picture that a family's image processor makes of an image, neither rescaled nor normalised."""
        (pixels,) = self.image_processor([image], do_rescale=False, do_normalize=False)["pixel_values"]
        return to_picture(pixels)

    def refuse_pixel_bounds(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """For families whose images all get one size."""
        if min_pixels is not None or max_pixels is not None:
            raise ProcessorError(
                f"min_pixels and max_pixels do nothing for {self.model_type}: {self.path} resizes all images "
                "to one size.  Leave them out."
            )

    def _find_image_token(self) -> int:
        token_id = self.config.image_token_id
        if token_id not in self._vision.values():
            is_known = token_id < len(self.tokenizer)
            name = repr(self.tokenizer.convert_ids_to_tokens(token_id)) if is_known else "nothing"
            raise ProcessorError(
                f"config.json of {self.path} says that image_token_id is {token_id}, which is {name} to the "
                "tokenizer; expected an added token.  Model and tokenizer do not belong together, or the "
                'placeholder was never added: tokenizer.add_tokens(["<image>"], special_tokens=True).'
            )
        return token_id

    def named_token(self, name: str, example: str) -> str:
        """A vision token by its name in tokenizer_config.json; ``example`` is what that file should hold."""
        token = getattr(self.tokenizer, name, None)
        if token not in self._vision:
            raise ProcessorError(
                f"The tokenizer of {self.path} has {token!r} as its {name}; expected a vision token.  Write into "
                f'tokenizer_config.json: "extra_special_tokens": {example}.'
            )
        return token

    def _find_stop_ids(self) -> list[int]:
        from transformers import GenerationConfig

        try:
            stops = GenerationConfig.from_pretrained(self.path, **self.hub).eos_token_id
        except OSError:  # the folder has no generation_config.json
            stops = None
        if stops is None:
            stops = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        stops = [stops] if isinstance(stops, int) else list(stops)
        end_of_turn = self._find_end_of_turn()
        if end_of_turn is None and self.tokenizer.eos_token_id in stops:
            end_of_turn = self.tokenizer.eos_token_id
        return list(dict.fromkeys([*([] if end_of_turn is None else [end_of_turn]), *stops]))

    def _find_end_of_turn(self) -> int | None:
        """The special token that the template puts behind an answer.  A base model's generation_config may
        not list it, yet nothing of use follows it."""
        ids = self.tokenizer.encode(self.template.text_after_answer(), add_special_tokens=False)
        for token_id in ids:
            added = self.tokenizer.added_tokens_decoder.get(token_id)
            if added is not None and added.special and token_id not in self._vision.values():
                return token_id
            if self.tokenizer.decode([token_id]).strip():
                return None
        return None

    def _check_images(self, turns: chat.Turns, images: Sequence[Any]) -> list[Image]:
        if not isinstance(images, Sequence) or isinstance(images, str | bytes):
            raise ProcessorError(f"images is a {type(images).__name__}; expected a list of PIL images.")
        expected = chat.count_images(turns)
        if len(images) != expected:
            typed = sorted(chat.find_markers(turns, tuple(self._vision)))
            hint = f"  {typed[0]!r} typed in a text is only text." if typed else ""
            raise ProcessorError(
                f"The messages hold {expected} image parts, but {len(images)} images were given.  Write one "
                f'{{"type": "image"}} part for each image, where it belongs.{hint}'
            )
        if images and not self.sees_images:
            raise ProcessorError(
                f"{self.path} ({self.model_type}) is text-only, but the prompt has {len(images)} images.  "
                "Replace them by text first: text_view(messages, image_text)."
            )
        return to_rgb_all(images)

    def _tokenize(
        self, pieces: Sequence[str], image_texts: Sequence[str], stand_ins: Mapping[str, str]
    ) -> tuple[list[int], tuple[Span, ...]]:
        """Ids of the rendered pieces with an image's text after each but the last, and where each image lies.

        Vision markers that a user typed pass through the template as private characters (``stand_ins``), which
        tells them from its own.  The tokenizer then reads the true text and makes special tokens of both, in an
        order that is known; the typed ones are replaced by the ids of their characters.
        """
        parts = [(piece, None) for piece in pieces]
        for k, image_text in reversed(list(enumerate(image_texts))):
            parts.insert(k + 1, (image_text, k))
        text, owners = "", []  # of every vision token: (marker, "typed", None or the image it belongs to)
        for part, owner in parts:
            restored, order = chat.restore_markers(part, stand_ins, tuple(self._vision))
            text += restored
            owners += [(marker, "typed" if is_typed else owner) for marker, is_typed in order]
        add_special_tokens = self._adds_special_tokens(text)
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        if not owners:
            return ids, ()
        vision = self.vision_token_ids()
        if [token for token in ids if token in vision] != [self._vision[marker] for marker, _ in owners]:
            typed = ", ".join(sorted(stand_ins.values())) or "a vision token"
            raise ProcessorError(
                f"The text spells out {typed} in a way that the tokenizer of {self.path} reads differently than "
                "it is written.  Remove it from the text."
            )
        plain = {marker: encode_as_plain_text(self.tokenizer, marker) for marker in stand_ins.values()}
        result: list[int] = []
        spans: dict[int, Span] = {}
        remaining = iter(owners)
        for token in ids:
            marker, owner = next(remaining) if token in vision else ("", None)
            if isinstance(owner, int):
                start, _ = spans.get(owner, (len(result), 0))
                spans[owner] = (start, len(result) + 1)
            result.extend(plain[marker] if owner == "typed" else [token])
        return result, tuple(spans[k] for k in range(len(image_texts)))

    def _adds_special_tokens(self, rendered: str) -> bool:
        """Hugging Face's rule for processors: the tokenizer adds its own unless the template wrote BOS."""
        bos = self.tokenizer.bos_token
        return bos is None or not rendered.startswith(bos)

    def _process(self, images: list[Image]) -> tuple[dict[str, Tensor], list[str]]:
        if not images:
            return {}, []
        try:
            return self.process_images(images)
        except ValueError as error:  # e.g. an aspect ratio the family cannot resize
            raise ProcessorError(f"{_sizes(images)} cannot be processed: {error}") from error

    def _leaves(self, resized: Image) -> bool:
        """Whether the image processor takes a picture as it is."""
        try:
            again = self.resize_image(resized)
        except ValueError:  # e.g. rounded to whole patches, its sides are too unlike for the family
            return False
        return again is not None and are_equal(again, resized)


def _sizes(images: Sequence[Image]) -> str:
    return f"The images ({', '.join(f'{image.width} x {image.height}' for image in images)} pixels)"


def _pad(rows: Sequence[Tensor], value: int, side: str) -> Tensor:
    import torch
    from torch.nn.functional import pad

    longest = max(len(row) for row in rows)
    missing = [(longest - len(row), 0) if side == "left" else (0, longest - len(row)) for row in rows]
    return torch.stack([pad(row, gap, value=value) for row, gap in zip(rows, missing, strict=True)])


def _as_list(ids: Any) -> list[int]:
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
