"""One model behind the three calls the library needs: prefill a prompt, decode against it, score responses.

It drives stock transformers models through their public forward.  A group's prompt (and its image) runs once; the
responses run against the cached prefix, also with gradient, which is exact.  What cannot do that (sliding-window or
linear attention; updates with gradient checkpointing) takes the plain path: one full row per rollout.

B prompts, R rollouts, P prompt tokens (left-padded), T response tokens (right-padded), H hidden size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from uniopd_mm.models.logprobs import token_logprobs

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from uniopd_mm.processors import EncodedPrompt, VLMProcessor

log = logging.getLogger(__name__)


@dataclass
class Prefix:
    """Prompts that have been run: what decoding and scoring continue from."""

    cache: Cache
    mask_BP: Tensor
    """[B, P] int64, 0 at padding."""
    next_position_B: Tensor
    """[B] position id of the first response token (M-RoPE: the same on all three axes)."""
    last_hidden_BH: Tensor
    """[B, H] hidden state that predicts the first response token."""

    def select(self, row_B: Tensor) -> Prefix:
        """Rows ``row_B`` of the batch, with repeats: [0, 0, 1] gives prompt 0 to two rollouts.  Consumes the cache."""
        self.cache.batch_select_indices(row_B)
        return Prefix(
            self.cache, self.mask_BP[row_B], self.next_position_B[row_B], self.last_hidden_BH[row_B]
        )


class MultimodalLM(nn.Module):
    """A stock transformers model (multimodal or text-only, peft-wrapped or not) with its processor."""

    def __init__(self, model: PreTrainedModel, processor: VLMProcessor, shared_prefix: bool = True) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        obstacle = self._shared_prefix_obstacle() if shared_prefix else None
        if obstacle:
            log.warning("shared_prefix is off: %s; every rollout runs its full row.", obstacle)
        self.shared_prefix = shared_prefix and obstacle is None

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
    def text_config(self) -> object:
        return self.transformer.config.get_text_config()

    def _shared_prefix_obstacle(self) -> str | None:
        kinds = set(getattr(self.text_config, "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            return f"{self.model_type} has {', '.join(sorted(kinds))} layers"
        return None

    # ------------------------------------------------------------------ the three calls

    def collate(self, encoded: list[EncodedPrompt]) -> dict[str, Tensor]:
        """Left-padded batch of prompts on the model's device."""
        batch = self.processor.collate(encoded, padding_side="left")
        dtype = next(self.model.parameters()).dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }

    def prefill(self, inputs: dict[str, Tensor]) -> Prefix:
        """Run prompts [B, P]: vision tower, projector and language model once each."""
        positions = self.position_ids(inputs)
        output = self.transformer.base_model(**inputs, position_ids=positions, use_cache=True)
        next_position_B = positions.amax(-1) + 1
        if next_position_B.dim() == 2:  # M-RoPE: [3, B]
            next_position_B = next_position_B.amax(0)
        return Prefix(
            output.past_key_values, inputs["attention_mask"], next_position_B, output.last_hidden_state[:, -1]
        )

    def decode(self, prefix: Prefix, token_R: Tensor, step: int, mask_RL: Tensor) -> Tensor:
        """Hidden states [R, H] after feeding the ``step``-th response token to every row; extends the cache.

        ``mask_RL`` [R, P + step + 1] marks the real positions, the fed token included.
        """
        positions = self._response_positions(prefix.next_position_B + step, 1)
        output = self.transformer.base_model(
            input_ids=token_R[:, None],
            attention_mask=mask_RL,
            position_ids=positions,
            past_key_values=prefix.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] float32."""
        return self.transformer.get_output_embeddings()(hidden).float()

    def forward(
        self,
        encoded: list[EncodedPrompt],
        row_R: Tensor,
        response_RT: Tensor,
        mask_RT: Tensor,
        temperature: float = 1.0,
    ) -> Tensor:
        """log p of every response token [R, T] float32 nats, 0 outside ``mask_RT``.

        ``row_R[r]`` is the prompt of rollout r; index t holds log p(token t | prompt, tokens < t).
        """
        # In training mode transformers recomputes activations, and discards the prefix's keys and values with them.
        share = self.shared_prefix and not (
            self.model.training and self.transformer.is_activation_checkpointing
        )
        hidden_of = self._hidden_shared if share else self._hidden_plain
        hidden_RTH = hidden_of(encoded, row_R, response_RT, mask_RT)
        keep = mask_RT.bool()
        head = self.transformer.get_output_embeddings()
        values = token_logprobs(hidden_RTH[keep], head, response_RT[keep], temperature)
        return torch.zeros(response_RT.shape, device=values.device).masked_scatter(keep, values)

    def _hidden_shared(
        self, encoded: list[EncodedPrompt], row_R: Tensor, response_RT: Tensor, mask_RT: Tensor
    ) -> Tensor:
        prefix = self.prefill(self.collate(encoded)).select(row_R)
        # Position t is predicted from token t-1, so the last token is never fed; a lone token is fed all the same,
        # because under ZeRO-3 every rank must run every layer equally often.
        n_fed = max(1, response_RT.shape[1] - 1)
        fed_RT, fed_mask_RT = response_RT[:, :n_fed], mask_RT[:, :n_fed]
        output = self.transformer.base_model(
            input_ids=fed_RT,
            attention_mask=torch.cat([prefix.mask_BP, fed_mask_RT.to(prefix.mask_BP.dtype)], dim=1),
            position_ids=self._response_positions(prefix.next_position_B, n_fed),
            past_key_values=prefix.cache,
            use_cache=True,
        )
        hidden_RTH = torch.cat([prefix.last_hidden_BH[:, None], output.last_hidden_state], dim=1)
        return hidden_RTH[:, : response_RT.shape[1]]

    def _hidden_plain(
        self, encoded: list[EncodedPrompt], row_R: Tensor, response_RT: Tensor, mask_RT: Tensor
    ) -> Tensor:
        inputs = self.collate([encoded[row] for row in row_R.tolist()])
        n_prompt, n_response = inputs["input_ids"].shape[1], response_RT.shape[1]
        positions = self.position_ids(inputs)
        next_position_R = positions.amax(-1) + 1
        next_position_R = next_position_R.amax(0) if next_position_R.dim() == 2 else next_position_R
        positions = torch.cat([positions, self._response_positions(next_position_R, n_response)], dim=-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], response_RT], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask_RT.to(torch.int64)], dim=1)
        if "mm_token_type_ids" in inputs:
            zeros = torch.zeros_like(response_RT)
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], zeros], dim=1)
        output = self.transformer.base_model(**inputs, position_ids=positions, use_cache=False)
        return output.last_hidden_state[:, n_prompt - 1 : -1]

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

    def _response_positions(self, start_R: Tensor, n: int) -> Tensor:
        positions_RT = start_R[:, None] + torch.arange(n, device=start_R.device)
        return positions_RT.expand(3, -1, -1) if self.uses_mrope else positions_RT
