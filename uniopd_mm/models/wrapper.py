"""One model behind the calls the library needs: run prompts, decode behind them, score responses.

It drives stock transformers models through their public forward.  A group's prompt (and its image) runs once, and its
responses attend to it (:mod:`uniopd_mm.models.attention`), also with gradient, which is exact.  What cannot do that
(linear attention, capped attention scores), or was told not to, takes the plain path: one full row per rollout.

B prompts, R rollouts, P prompt tokens (left-padded), T response tokens (right-padded), H hidden size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from uniopd_mm.errors import AlignmentError
from uniopd_mm.models.attention import (
    Prefix,
    PrefixPass,
    ResponsePass,
    shared_prefix_obstacle,
    use_shared_prefix,
    windows_of,
)
from uniopd_mm.models.logprobs import token_logprobs
from uniopd_mm.models.vision import Features, ImageEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast

    from uniopd_mm.processors import EncodedPrompt, VLMProcessor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, or of prompts with their responses, as the language model reads it."""

    inputs: dict[str, Tensor]
    """[B, P] each: ``input_ids``, ``attention_mask`` and the family's own."""
    positions: Tensor
    """[B, P], or [3, B, P] for M-RoPE."""
    images: list[Features | None]
    """What each prompt's image tokens stand for; None without images."""

    def rows(self, row_R: Tensor) -> Prompts:
        """One prompt per rollout, padded to the longest of them."""
        longest = int(self.inputs["attention_mask"][row_R].sum(-1).max())
        return Prompts(
            {name: value[row_R, -longest:] for name, value in self.inputs.items()},
            self.positions[..., row_R, -longest:],
            [self.images[row] for row in row_R.tolist()],
        )


class MultimodalLM(nn.Module):
    """A stock transformers model (multimodal or text-only, peft-wrapped or not) with its processor."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: VLMProcessor,
        shared_prefix: bool = True,
        vision_cache_mib: int = 1024,
    ) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        obstacle = shared_prefix_obstacle(self.transformer) if shared_prefix else None
        if obstacle:
            log.warning("shared_prefix is off: %s; every rollout runs its full row.", obstacle)
        self.shared_prefix = shared_prefix and obstacle is None
        if self.shared_prefix:
            use_shared_prefix(self.transformer)
        sees_images = hasattr(self.transformer.base_model, "get_image_features")
        self.images = ImageEncoder(self.transformer, vision_cache_mib << 20) if sees_images else None

    def sharing_copy(self) -> MultimodalLM:
        """Other modules around the same weights, processor and image features: what hangs hooks on the one, as ZeRO-3
        does, leaves the other alone."""
        shared = [self.processor, *self.parameters(), *self.buffers()]
        if self.images is not None:
            shared.append(self.images.cache)
        return copy.deepcopy(self, {id(part): part for part in shared})

    def take_buffers_of(self, source: MultimodalLM) -> None:
        """Share ``source``'s buffers from now on, after they were replaced; parameters are changed in place."""
        for module, twin in zip(source.modules(), self.modules(), strict=True):
            for name, buffer in module.named_buffers(recurse=False):
                setattr(twin, name, buffer)

    # ------------------------------------------------------------------ the parts

    @property
    def transformer(self) -> PreTrainedModel:
        """The transformers model, also below adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def model_type(self) -> str:
        return self.transformer.config.model_type

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def uses_mrope(self) -> bool:
        return hasattr(self.transformer.base_model, "get_rope_index")

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.transformer.config.get_text_config()

    def collate(self, encoded: list[EncodedPrompt]) -> dict[str, Tensor]:
        """Left-padded batch of prompts on the model's device."""
        batch = self.processor.collate(encoded, padding_side="left")
        dtype = next(self.model.parameters()).dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] float32."""
        logits = self.transformer.get_output_embeddings()(hidden).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def softcap(self) -> float | None:
        """Bound that the model puts on its logits; None = none."""
        return getattr(self.text_config, "final_logit_softcapping", None)

    # ------------------------------------------------------------------ prompts

    def prepare(self, encoded: list[EncodedPrompt]) -> Prompts:
        """Prompts as the language model reads them: the image encoder has run, once."""
        inputs = self.collate(encoded)
        positions = self.position_ids(inputs)
        pixels = self.images.take_inputs(inputs) if self.images is not None else {}
        features = self._encode_images(encoded, pixels) if pixels else [None] * len(encoded)
        return Prompts(inputs, positions, features)

    def prefill(self, encoded: list[EncodedPrompt]) -> Prefix:
        """Run prompts: image encoder and language model once each."""
        prompts, prefix = self.prepare(encoded), PrefixPass()
        output = self.run_prompts(prompts, shared_prefix=prefix)
        wanted = windows_of(self.text_config)
        if prefix.windows != wanted:
            raise RuntimeError(
                f"{self.model_type}: its layers attend over windows of {prefix.windows} tokens, its config says {wanted}, "
                "so its prompts cannot be shared. Set shared_prefix: false for this model."
            )
        return Prefix(
            prefix.keys,
            prefix.values,
            prefix.source,
            prompts.inputs["attention_mask"].bool(),
            next_position(prompts.positions),
            output.last_hidden_state[:, -1],
        )

    def run_prompts(self, prompts: Prompts, **kwargs: object) -> BaseModelOutputWithPast:
        """The model without its head."""
        seen = [features for features in prompts.images if features is not None]
        images = {"mm_encoder_outputs": {"image": self.images.as_output(seen)}} if seen else {}
        return self.run({**prompts.inputs, **images}, prompts.positions, **kwargs)

    def remember_images(self, encoded: list[EncodedPrompt]) -> None:
        """Run the frozen part of the image encoder on prompts that it has not seen, so that no later pass does."""
        if self._keeps_images:
            for key, inputs in self._images_of(encoded):
                self.images.remember(key, inputs)

    def knows_images(self, encoded: list[EncodedPrompt]) -> bool:
        """Nothing is left for :meth:`remember_images` to do."""
        return not self._keeps_images or all(
            self.images.key(prompt) in self.images.cache for prompt in encoded if prompt.image_spans
        )

    def trim_images(self) -> None:
        """Bring the features kept from earlier steps down to the memory allowed."""
        if self.images is not None:
            self.images.cache.trim()

    @property
    def _keeps_images(self) -> bool:
        return self.images is not None and self.images.keeps != "nothing"

    def _images_of(self, encoded: list[EncodedPrompt]) -> list[tuple[bytes, dict[str, Tensor]]]:
        """Content and inputs of the images, prompt by prompt."""
        return [
            (self.images.key(prompt), self.images.take_inputs(self.collate([prompt])))
            for prompt in encoded
            if prompt.image_spans
        ]

    def _encode_images(
        self, encoded: list[EncodedPrompt], pixels: dict[str, Tensor]
    ) -> list[Features | None]:
        """Features of each prompt's images, None without; ``pixels`` are the image encoder's inputs of all of them."""
        if self._keeps_images:
            features = self.images.recall(self._images_of(encoded))
        else:
            features = self.images.encode(pixels)
        counts = [
            int((prompt.input_ids == self.processor.image_token_id).sum())
            for prompt in encoded
            if prompt.image_spans
        ]
        if sum(counts) != len(features[0]):
            raise AlignmentError(
                f"{self.processor.path}: the processor made {sum(counts)} image tokens, the vision tower "
                f"{len(features[0])} features. Processor files and weights do not belong together."
            )
        parts = zip(*(layer.split(counts) for layer in features), strict=True)
        return [next(parts) if prompt.image_spans else None for prompt in encoded]

    def run(
        self, inputs: Mapping[str, object], positions: Tensor, **kwargs: object
    ) -> BaseModelOutputWithPast:
        """The model without its head."""
        return self.transformer.base_model(**{"use_cache": False, **inputs, **kwargs}, position_ids=positions)

    # ------------------------------------------------------------------ responses

    def forward(
        self,
        encoded: list[EncodedPrompt],
        row_R: Tensor,
        response_RT: Tensor,
        mask_RT: Tensor,
        temperature: float = 1.0,
        chunks: list[Tensor] | None = None,
    ) -> Tensor:
        """log p of every response token [R, T] float32 nats, 0 outside ``mask_RT``.

        ``row_R[r]`` is the prompt of rollout r; index t holds log p(token t | prompt, tokens < t).  ``chunks``:
        rollouts that run together, every one in exactly one of them; the activations of all but the last chunk are
        computed again in the backward pass.
        """
        chunks = [torch.arange(len(row_R), device=row_R.device)] if chunks is None else chunks
        hidden, where = self._hidden(encoded, row_R, response_RT, mask_RT, chunks)
        head = self.transformer.get_output_embeddings()
        values = token_logprobs(hidden, head, response_RT[where], temperature, self.softcap)
        return values.new_zeros(response_RT.shape).index_put(where, values)

    def _hidden(
        self,
        encoded: list[EncodedPrompt],
        row_R: Tensor,
        response_RT: Tensor,
        mask_RT: Tensor,
        chunks: list[Tensor],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Hidden states [M, H] that predict the real tokens, and the (rollout, position) of each."""
        prefix = self.prefill(encoded) if self.shared_prefix else None
        prompts = self.prepare(encoded) if prefix is None else None
        # In training mode transformers recomputes layer by layer already.
        recomputes = self.model.training and self.transformer.is_activation_checkpointing
        hidden, rollouts, positions = [], [], []
        for chunk in chunks:
            n_tokens = int(mask_RT[chunk].sum(-1).max())
            # Position t is predicted from token t-1, so the last token is never fed; a lone token is fed all the
            # same, because under ZeRO-3 every rank must run every layer equally often.
            fed = slice(0, max(1, n_tokens - 1))
            if prefix is None:
                run = partial(self._run_rows, prompts.rows(row_R[chunk]))
            else:
                run = partial(self._continue, prefix, row_R[chunk])
            if torch.is_grad_enabled() and chunk is not chunks[-1] and not recomputes:
                with set_checkpoint_early_stop(False):  # ZeRO-3 must see every layer's end
                    states = checkpoint(run, response_RT[chunk, fed], use_reentrant=False)
            else:
                states = run(response_RT[chunk, fed])
            keep = mask_RT[chunk, :n_tokens]
            hidden.append(states[:, :n_tokens][keep])
            rollout, position = keep.nonzero(as_tuple=True)
            rollouts.append(chunk[rollout])
            positions.append(position)
        return torch.cat(hidden), (torch.cat(rollouts), torch.cat(positions))

    def _continue(self, prefix: Prefix, row_R: Tensor, fed_RT: Tensor) -> Tensor:
        """Hidden states [R, T + 1, H] that predict the fed tokens and the one behind them."""
        output = self.run(
            {"input_ids": fed_RT, "attention_mask": no_mask(fed_RT)},
            self.response_positions(prefix.next_position_B[row_R], fed_RT.shape[1]),
            shared_prefix=ResponsePass(prefix, row_R, fed_RT.shape[1]),
        )
        return torch.cat([prefix.last_hidden_BH[row_R][:, None], output.last_hidden_state], dim=1)

    def _run_rows(self, prompts: Prompts, fed_RT: Tensor) -> Tensor:
        """See :meth:`_continue`; one prompt and its response per row."""
        n_tokens = fed_RT.shape[1]
        behind = self.response_positions(next_position(prompts.positions), n_tokens)
        # Padding stands behind a response, where none of its tokens looks: no mask needed.
        response = dict.fromkeys(self.processor.token_inputs, torch.zeros_like(fed_RT))
        response |= {"input_ids": fed_RT, "attention_mask": torch.ones_like(fed_RT)}
        rows = Prompts(
            {name: torch.cat([prompts.inputs[name], tokens], dim=1) for name, tokens in response.items()},
            torch.cat([prompts.positions, behind], dim=-1),
            prompts.images,
        )
        return self.run_prompts(rows).last_hidden_state[:, -n_tokens - 1 :]

    # ------------------------------------------------------------------ positions

    def position_ids(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B, P], or [3, B, P] for M-RoPE.  Always explicit: some families fall back to wrong ones silently."""
        mask_BP = inputs["attention_mask"]
        plain_BP = (mask_BP.cumsum(-1) - 1).clamp(min=0)
        if not self.uses_mrope:
            return plain_BP
        if "image_grid_thw" not in inputs:
            return plain_BP.expand(3, -1, -1)
        positions, _ = self.transformer.base_model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=mask_BP,
        )
        # Families disagree on what padding gets; 0 keeps it below every real position.
        return torch.where(mask_BP.bool(), positions, torch.zeros_like(positions))

    def response_positions(self, start_R: Tensor, n: int) -> Tensor:
        positions_RT = start_R[:, None] + torch.arange(n, device=start_R.device)
        return positions_RT.expand(3, -1, -1) if self.uses_mrope else positions_RT


def next_position(positions: Tensor) -> Tensor:
    """[B] the position behind each prompt, of [B, P] or [3, B, P]."""
    next_position = positions.amax(-1) + 1
    return next_position.amax(0) if next_position.dim() == 2 else next_position


def no_mask(like: Tensor) -> Tensor:
    """Keeps transformers from building a mask that our attention would not read."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=like.device)
