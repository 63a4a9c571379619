"""Images -> what the language model reads in their place; the frozen part runs once per image.

What is frozen decides what can be kept: tower and projector frozen, the projected features; the tower alone, its
output; nothing, when the tower is trained.  A new family that this file does not know how to project (``TOWERS``) keeps
nothing either while its projector is trained, which is slower and as right.

N image tokens (placeholders) of some prompts, in their order; H hidden size of the language model.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from uniopd_mm.models.stages import stage_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

    from uniopd_mm.processors import EncodedPrompt

States = tuple[Tensor, ...]
"""Output of a vision tower for the images of one prompt, before the projector."""
Features = tuple[Tensor, ...]
"""What stands in the place of image tokens [N, H]: in the first layer and, in Qwen3-VL, added behind the next ones."""


@dataclass(frozen=True)
class Tower:
    """How one family's ``get_image_features`` falls into a tower and a projector."""

    run: Callable[[Any, dict[str, Tensor]], States]
    """(base model, the vision inputs of a prompt) -> states."""
    project: Callable[[Any, list[States], list[dict[str, Tensor]]], Features]
    """(base model, states and vision inputs of several prompts) -> features of all of them.  One call of the projector
    for all: ranks must call it equally often."""


def _select(base: Any, pixels: Tensor) -> Tensor:
    """Hidden states [images, patches, size] of the layers that the projector reads, without a class token."""
    config = base.config
    layers = config.vision_feature_layer
    hidden = base.vision_tower(pixels, output_hidden_states=True).hidden_states
    kept = torch.cat([hidden[i] for i in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    return kept[:, 1:] if config.vision_feature_select_strategy == "default" else kept


def _run_llava(base: Any, inputs: dict[str, Tensor]) -> States:
    return (_select(base, inputs["pixel_values"]),)


def _run_tiled(base: Any, inputs: dict[str, Tensor]) -> States:
    """One tensor [tiles, patches, size] per image, which are padded to as many tiles as the largest has."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = base.config
    counts = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in inputs["image_sizes"]
    ]
    # LLaVA-OneVision tiles an image only where it is alone.
    if "batch_num_images" in inputs and len(counts) > 1:
        counts = [1] * len(counts)
    tiles = [image[:n] for image, n in zip(inputs["pixel_values"], counts, strict=True)]
    return _select(base, torch.cat(tiles)).split(counts)


def _project_tiled(base: Any, states: list[States], inputs: list[dict[str, Tensor]]) -> Features:
    """Tiles are laid together to one image, a newline behind each row."""
    images = [image for prompt in states for image in prompt]
    projected = base.multi_modal_projector(torch.cat(images)).split([len(image) for image in images])
    sizes = torch.cat([prompt["image_sizes"] for prompt in inputs])
    names = inspect.signature(base.pack_image_features).parameters
    settings = {name: getattr(base.config, name) for name in names if hasattr(base.config, name)}
    packed, _ = base.pack_image_features(projected, sizes, image_newline=base.image_newline, **settings)
    return (torch.cat(packed),)


def _run_internvl(base: Any, inputs: dict[str, Tensor]) -> States:
    """[tiles, tokens, size], neighbouring patches laid together."""
    config = base.config
    layer = config.vision_feature_layer
    output = base.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    if config.vision_feature_select_strategy == "default":
        states = states[:, 1:]
    side = math.isqrt(states.shape[1])
    shuffled = base.pixel_shuffle(states.unflatten(1, (side, side)), scale_factor=config.downsample_ratio)
    return (shuffled.flatten(1, 2),)


def _run_whole(base: Any, inputs: dict[str, Tensor]) -> States:
    """The tower's last output, which ``get_image_features`` hands on beside what the projector made of it."""
    return (base.get_image_features(**inputs, return_dict=True).last_hidden_state,)


def _project_by(name: str) -> Callable[..., Features]:
    """For a projector that is a module ``name`` and nothing else."""

    def project(base: Any, states: list[States], inputs: list[dict[str, Tensor]]) -> Features:
        return (getattr(base, name)(torch.cat([whole for (whole,) in states])).flatten(0, -2),)

    return project


def _run_qwen(base: Any, inputs: dict[str, Tensor]) -> States:
    visual, grid = base.visual, inputs["image_grid_thw"]
    return (visual(inputs["pixel_values"], grid_thw=grid).last_hidden_state,)


def _run_qwen3(base: Any, inputs: dict[str, Tensor]) -> States:
    """The last layer's output and those of the layers that are also fed into the language model (DeepStack)."""
    visual, grid = base.visual, inputs["image_grid_thw"]
    output = visual(inputs["pixel_values"], grid_thw=grid, output_hidden_states=True)
    # hidden_states[0] is the input of the first block.
    deep = [output.hidden_states[i + 1] for i in visual.deepstack_visual_indexes]
    return (output.last_hidden_state, *deep)


def _project_qwen(base: Any, states: list[States], inputs: list[dict[str, Tensor]]) -> Features:
    """Qwen3-VL merges the layers it feeds into the language model by mergers of their own."""
    from transformers.vision_utils import get_vision_window_index

    visual = base.visual
    last, *deep = (torch.cat(layer) for layer in zip(*states, strict=True))
    merged = visual.merger(last)
    if hasattr(visual, "fullatt_block_indexes"):  # Qwen2.5-VL leaves the patches in the order of its windows
        grid = torch.cat([prompt["image_grid_thw"] for prompt in inputs])
        order, _ = get_vision_window_index(
            grid, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        merged = merged[torch.argsort(order).to(merged.device)]
    mergers = getattr(visual, "deepstack_merger_list", ())
    return (merged, *(merger(layer) for merger, layer in zip(mergers, deep, strict=True)))


TOWERS = {
    "llava": Tower(_run_llava, _project_by("multi_modal_projector")),
    "llava_next": Tower(_run_tiled, _project_tiled),
    "llava_onevision": Tower(_run_tiled, _project_tiled),
    "internvl": Tower(_run_internvl, _project_by("multi_modal_projector")),
    "gemma3": Tower(_run_whole, _project_by("multi_modal_projector")),
    "gemma4": Tower(_run_whole, _project_by("embed_vision")),
    "idefics3": Tower(_run_whole, _project_by("connector")),
    "smolvlm": Tower(_run_whole, _project_by("connector")),
    "qwen2_vl": Tower(_run_qwen, _project_qwen),
    "qwen2_5_vl": Tower(_run_qwen, _project_qwen),
    "qwen3_vl": Tower(_run_qwen3, _project_qwen),
    "qwen3_vl_moe": Tower(_run_qwen3, _project_qwen),
    "qwen3_5": Tower(_run_qwen, _project_qwen),
    "qwen3_5_moe": Tower(_run_qwen, _project_qwen),
    "qwen4_exp": Tower(_run_qwen, _project_qwen),
}
"""``config.model_type`` -> its tower and projector, for models whose projector is trained on a frozen tower."""
READ_AS_ONE_TENSOR = frozenset({"gemma3", "internvl"})
"""Families whose forward takes all images as one tensor; the others take a list of tensors."""


class FeatureCache:
    """What frozen parts gave for the images of a prompt, by content; shrunk only when told to."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.n_bytes = max_bytes, 0
        self.kept: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()

    def get(self, key: bytes, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if key not in self.kept:
            self.kept[key] = compute()
            self.n_bytes += sum(t.nbytes for t in self.kept[key])
        self.kept.move_to_end(key)
        return self.kept[key]

    def __contains__(self, key: bytes) -> bool:
        return key in self.kept

    def trim(self) -> None:
        """Forget the images not used for longest, down to the memory allowed.  Never inside a step: what sampling
        computed must still be there in the update, where ranks may not run a partitioned tower at different times."""
        while self.n_bytes > self.max_bytes:
            _, forgotten = self.kept.popitem(last=False)
            self.n_bytes -= sum(t.nbytes for t in forgotten)


class ImageEncoder:
    """The images of prompts as features, with a bounded memory of what frozen parts gave."""

    def __init__(self, model: PreTrainedModel, max_bytes: int) -> None:
        self.base, self.model_type = model.base_model, model.config.model_type
        self.cache = FeatureCache(max_bytes)
        self.input_names = frozenset(inspect.signature(self.base.get_image_features).parameters)
        self.parameters: dict[str, list[nn.Parameter]] = {"vision": [], "projector": []}
        for name, parameter in model.named_parameters():
            stage = stage_of(self.model_type, name)
            if stage in self.parameters:
                self.parameters[stage].append(parameter)

    @property
    def keeps(self) -> Literal["features", "tower", "nothing"]:
        """What is the same whenever an image comes by again."""
        if any(p.requires_grad for p in self.parameters["vision"]):
            return "nothing"
        if not any(p.requires_grad for p in self.parameters["projector"]):
            return "features"
        return "tower" if self.model_type in TOWERS else "nothing"

    def take_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Move what the image encoder reads out of the inputs of a model; {} without images."""
        return {name: inputs.pop(name) for name in list(inputs) if name in self.input_names}

    def key(self, prompt: EncodedPrompt) -> bytes:
        """The content of a prompt's images."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.take_inputs(dict(prompt.model_inputs)).items()):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy())
        return digest.digest()

    def encode(self, inputs: dict[str, Tensor]) -> Features:
        """Features of a batch of images, nothing kept, with gradient."""
        output = self.base.get_image_features(**inputs, return_dict=True)
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        return tuple((x if isinstance(x, Tensor) else torch.cat(list(x))).flatten(0, -2) for x in layers)

    def recall(self, images: list[tuple[bytes, dict[str, Tensor]]]) -> Features:
        """Features of several prompts' images (key and inputs of each), the frozen part run only where it has not been;
        with gradient where the projector is trained."""
        kept = [self.remember(key, inputs) for key, inputs in images]
        if self.keeps == "tower":
            return TOWERS[self.model_type].project(self.base, kept, [inputs for _, inputs in images])
        return _join(kept)

    def remember(self, key: bytes, inputs: dict[str, Tensor]) -> States | Features:
        """What the frozen part gives for one prompt's images, computed when it is not known yet."""
        return self.cache.get(key, lambda: self._run_frozen(inputs))

    @torch.no_grad()
    def _run_frozen(self, inputs: dict[str, Tensor]) -> States | Features:
        if self.keeps == "features":
            return self.encode(inputs)
        return TOWERS[self.model_type].run(self.base, inputs)

    def as_output(self, features: list[Features]) -> ModelOutput:
        """The features of several prompts as the model's forward takes them (``mm_encoder_outputs``)."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        first, *deep = _join(features)
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=first[None] if self.model_type in READ_AS_ONE_TENSOR else [first],
            deepstack_features=[[layer] for layer in deep],
        )


def _join(prompts: list[Features]) -> Features:
    return tuple(torch.cat(layer) for layer in zip(*prompts, strict=True))
