"""Images -> what the language model reads in their place; the frozen part runs once per image.

What is frozen decides what can be kept: tower and projector frozen, the projected features of any family; the tower
alone, its output, for the families that this file knows how to project (``TOWERS``); nothing, otherwise.
"""

from __future__ import annotations

import hashlib
import inspect
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


def _run_llava(base: Any, inputs: dict[str, Tensor]) -> Features:
    config = base.config
    layers = config.vision_feature_layer
    hidden = base.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    kept = [hidden[i] for i in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":  # without the class token
        kept = [states[:, 1:] for states in kept]
    return (torch.cat(kept, dim=-1),)


def _project_llava(base: Any, features: list[Features], inputs: list[dict[str, Tensor]]) -> ModelOutput:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    images = [image for (states,) in features for image in states]
    projected = base.multi_modal_projector(torch.cat(images))
    return BaseModelOutputWithPooling(pooler_output=list(projected.split([len(image) for image in images])))


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
    "qwen2_vl": Tower(_run_qwen, _project_qwen),
    "qwen2_5_vl": Tower(_run_qwen, _project_qwen),
    "qwen3_vl": Tower(_run_qwen3, _project_qwen),
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
        self.parameters: dict[str, list[nn.Parameter]] = {"vision": [], "projector": [], "language": []}
        for name, parameter in model.named_parameters():
            self.parameters[stage_of(self.model_type, name)].append(parameter)

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
    deep = getattr(output, "deepstack_features", None)
    return type(output)(
        pooler_output=list(output.pooler_output),
        **({} if deep is None else {"deepstack_features": [list(layer) for layer in deep]}),
    )


def _join(outputs: list[Any]) -> Any:
    joined = _only_used(outputs[0])
    for output in outputs[1:]:
        joined.pooler_output.extend(output.pooler_output)
        if getattr(joined, "deepstack_features", None):
            for layer, more in zip(joined.deepstack_features, output.deepstack_features, strict=True):
                layer.extend(more)
    return joined


def _n_bytes(found: Any) -> int:
    if isinstance(found, Tensor):
        return found.numel() * found.element_size()
    return sum(_n_bytes(part) for part in (found.values() if hasattr(found, "values") else found))
