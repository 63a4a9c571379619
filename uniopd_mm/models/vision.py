"""Images -> what the language model reads in their place; the frozen part runs once per image.

What is frozen decides what can be kept: tower and projector frozen, the projected features of any family; the tower
alone, its output, for the families that this file knows how to project (``TOWERS``); nothing, otherwise.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from uniopd_mm.models.stages import stage_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

    from uniopd_mm.processors import EncodedPrompt

Features = tuple[Tensor, ...]
"""Output of a vision tower for the images of one prompt, before the projector."""


@dataclass(frozen=True)
class Tower:
    """How one family's ``get_image_features`` falls into a tower and a projector."""

    run: Callable[[Any, dict[str, Tensor]], Features]
    """(base model, the vision inputs of a prompt) -> features."""
    project: Callable[[Any, list[Features], list[dict[str, Tensor]]], ModelOutput]
    """(base model, features and vision inputs of several prompts) -> what ``get_image_features`` returns for all their
    images.  One call of the projector for all: ranks must call it equally often."""


def _select(base: Any, pixels: Tensor) -> Tensor:
    """Hidden states [images, patches, size] of the layers that the projector reads, without a class token."""
    config = base.config
    layers = config.vision_feature_layer
    hidden = base.vision_tower(pixels, output_hidden_states=True).hidden_states
    kept = torch.cat([hidden[i] for i in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    return kept[:, 1:] if config.vision_feature_select_strategy == "default" else kept


def _run_llava(base: Any, inputs: dict[str, Tensor]) -> Features:
    return (_select(base, inputs["pixel_values"]),)


def _project_llava(base: Any, features: list[Features], inputs: list[dict[str, Tensor]]) -> ModelOutput:
    images = [image for (states,) in features for image in states]
    projected = base.multi_modal_projector(torch.cat(images))
    return _output(list(projected.split([len(image) for image in images])))


def _run_tiled(base: Any, inputs: dict[str, Tensor]) -> Features:
    """One tensor [tiles, patches, size] per image: LLaVA-NeXT pads images to as many tiles as the largest has."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = base.config
    counts = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in inputs["image_sizes"]
    ]
    if (
        "batch_num_images" in inputs and len(counts) > 1
    ):  # LLaVA-OneVision tiles an image only where it is alone
        counts = [1] * len(counts)
    tiles = [image[:n] for image, n in zip(inputs["pixel_values"], counts, strict=True)]
    return _select(base, torch.cat(tiles)).split(counts)


def _project_tiled(base: Any, features: list[Features], inputs: list[dict[str, Tensor]]) -> ModelOutput:
    images = [image for prompt in features for image in prompt]
    projected = base.multi_modal_projector(torch.cat(images)).split([len(image) for image in images])
    sizes = torch.cat([prompt["image_sizes"] for prompt in inputs])
    names = inspect.signature(base.pack_image_features).parameters
    settings = {name: getattr(base.config, name) for name in names if hasattr(base.config, name)}
    packed, _ = base.pack_image_features(projected, sizes, image_newline=base.image_newline, **settings)
    return _output(packed)


def _run_internvl(base: Any, inputs: dict[str, Tensor]) -> Features:
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


def _run_whole(base: Any, inputs: dict[str, Tensor]) -> Features:
    """The tower's last output, which ``get_image_features`` hands on beside what the projector made of it."""
    return (base.get_image_features(**inputs, return_dict=True).last_hidden_state,)


def _project_whole(name: str, as_list: bool) -> Callable[..., ModelOutput]:
    """For projectors that are a module ``name`` and nothing else."""

    def project(base: Any, features: list[Features], inputs: list[dict[str, Tensor]]) -> ModelOutput:
        projected = getattr(base, name)(torch.cat([states for (states,) in features]))
        return _output([projected.flatten(0, -2)] if as_list else projected)

    return project


def _output(pooled: list[Tensor] | Tensor) -> ModelOutput:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=pooled)


def _run_qwen(base: Any, inputs: dict[str, Tensor]) -> Features:
    visual, grid = base.visual, inputs["image_grid_thw"]
    return (visual(inputs["pixel_values"], grid_thw=grid).last_hidden_state,)


def _run_qwen3(base: Any, inputs: dict[str, Tensor]) -> Features:
    """The last layer's output and those of the layers that are also fed into the language model (DeepStack)."""
    visual, grid = base.visual, inputs["image_grid_thw"]
    output = visual(inputs["pixel_values"], grid_thw=grid, output_hidden_states=True)
    # hidden_states[0] is the input of the first block.
    deep = [output.hidden_states[i + 1] for i in visual.deepstack_visual_indexes]
    return (output.last_hidden_state, *deep)


def _project_qwen(base: Any, features: list[Features], inputs: list[dict[str, Tensor]]) -> ModelOutput:
    """Qwen3-VL merges the layers it feeds into the language model by mergers of their own."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
    from transformers.vision_utils import get_vision_window_index

    visual = base.visual
    grid = torch.cat([prompt["image_grid_thw"] for prompt in inputs])
    sizes = (grid.prod(-1) // visual.spatial_merge_size**2).tolist()
    last, *deep = (torch.cat(layer) for layer in zip(*features, strict=True))
    merged = visual.merger(last)
    if hasattr(visual, "fullatt_block_indexes"):  # Qwen2.5-VL leaves the patches in the order of its windows
        order, _ = get_vision_window_index(
            grid, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        merged = merged[torch.argsort(order).to(merged.device)]
    mergers = getattr(visual, "deepstack_merger_list", ())
    return BaseModelOutputWithDeepstackFeatures(
        pooler_output=list(merged.split(sizes)),
        deepstack_features=[list(m(x).split(sizes)) for m, x in zip(mergers, deep, strict=True)] or None,
    )


TOWERS = {
    "llava": Tower(_run_llava, _project_llava),
    "llava_next": Tower(_run_tiled, _project_tiled),
    "llava_onevision": Tower(_run_tiled, _project_tiled),
    "internvl": Tower(_run_internvl, _project_whole("multi_modal_projector", as_list=False)),
    "gemma3": Tower(_run_whole, _project_whole("multi_modal_projector", as_list=False)),
    "gemma4": Tower(_run_whole, _project_whole("embed_vision", as_list=True)),
    "idefics3": Tower(_run_whole, _project_whole("connector", as_list=True)),
    "smolvlm": Tower(_run_whole, _project_whole("connector", as_list=True)),
    "qwen2_vl": Tower(_run_qwen, _project_qwen),
    "qwen2_5_vl": Tower(_run_qwen, _project_qwen),
    "qwen3_vl": Tower(_run_qwen3, _project_qwen),
    "qwen3_vl_moe": Tower(_run_qwen3, _project_qwen),
    "qwen3_5": Tower(_run_qwen, _project_qwen),
    "qwen3_5_moe": Tower(_run_qwen, _project_qwen),
}
"""``config.model_type`` -> its tower and projector, for models whose projector is trained on a frozen tower."""


class FeatureCache:
    """What frozen parts gave for the images of a prompt, by content; shrunk only when told to."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.n_bytes = max_bytes, 0
        self.kept: OrderedDict[bytes, Any] = OrderedDict()

    def get(self, key: bytes, compute: Callable[[], Any]) -> Any:
        if key not in self.kept:
            self.kept[key] = compute()
            self.n_bytes += _n_bytes(self.kept[key])
        self.kept.move_to_end(key)
        return self.kept[key]

    def __contains__(self, key: bytes) -> bool:
        return key in self.kept

    def trim(self) -> None:
        """Forget the images not used for longest, down to the memory allowed.  Never inside a step: what sampling
        computed must still be there in the update, where ranks may not run a partitioned tower at different times."""
        while self.n_bytes > self.max_bytes:
            _, forgotten = self.kept.popitem(last=False)
            self.n_bytes -= _n_bytes(forgotten)


class ImageEncoder:
    """The images of prompts as ``mm_encoder_outputs``, with a bounded memory of what frozen parts gave."""

    def __init__(self, model: PreTrainedModel, max_bytes: int) -> None:
        self.base, self.model_type = model.base_model, model.config.model_type
        self.cache = FeatureCache(max_bytes)
        self.input_names = frozenset(inspect.signature(self.base.get_image_features).parameters)
        self.parameters: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            self.parameters.setdefault(stage_of(self.model_type, name), []).append(parameter)

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

    def encode(self, inputs: dict[str, Tensor]) -> ModelOutput:
        """Encoder output of a batch of images, nothing kept, with gradient."""
        return _only_used(self.base.get_image_features(**inputs, return_dict=True))

    def recall(self, images: list[tuple[bytes, dict[str, Tensor]]]) -> ModelOutput:
        """Encoder output of several prompts' images (key and inputs of each), the frozen part run only where it has
        not been; with gradient where the projector is trained."""
        kept = [self.remember(key, inputs) for key, inputs in images]
        if self.keeps == "tower":
            return TOWERS[self.model_type].project(self.base, kept, [inputs for _, inputs in images])
        return _join(kept)

    def remember(self, key: bytes, inputs: dict[str, Tensor]) -> Any:
        """What the frozen part gives for one prompt's images, computed when it is not known yet."""
        return self.cache.get(key, lambda: self._run_frozen(inputs))

    @torch.no_grad()
    def _run_frozen(self, inputs: dict[str, Tensor]) -> Any:
        if self.keeps == "features":
            return self.encode(inputs)
        return TOWERS[self.model_type].run(self.base, inputs)


def _only_used(output: Any) -> Any:
    """The encoder output without the hidden states that no language model reads."""
    return _join([output])


def _join(outputs: list[Any]) -> Any:
    """The encoder output of all images; a family gives a list of tensors, or one with the images on dim 0."""

    def joined(parts: Sequence[Any]) -> Any:
        return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else [x for part in parts for x in part]

    fields = {"pooler_output": joined([output.pooler_output for output in outputs])}
    deep = [getattr(output, "deepstack_features", None) for output in outputs]
    if deep[0] is not None:
        fields["deepstack_features"] = [joined(layer) for layer in zip(*deep, strict=True)]
    return type(outputs[0])(**fields)


def _n_bytes(found: Any) -> int:
    if isinstance(found, Tensor):
        return found.numel() * found.element_size()
    return sum(_n_bytes(part) for part in (found.values() if hasattr(found, "values") else found))
