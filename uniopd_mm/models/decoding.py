"""Responses in flight: every row has the hidden state that predicts its next token, and is fed one token a step.

R rows (rollouts), H hidden size, L prompt and response tokens so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uniopd_mm.models.attention import DecodePass
from uniopd_mm.models.wrapper import MultimodalLM, next_position, no_mask

if TYPE_CHECKING:
    from uniopd_mm.processors import EncodedPrompt


def start_decoding(lm: MultimodalLM, encoded: list[EncodedPrompt], n: int) -> SharedDecoding | PlainDecoding:
    """Run the prompts, ready to decode ``n`` responses of each (rows in the order of the prompts)."""
    return (SharedDecoding if lm.shared_prefix else PlainDecoding)(lm, encoded, n)


class SharedDecoding:
    """Responses in flight behind prompts that ran once."""

    def __init__(self, lm: MultimodalLM, encoded: list[EncodedPrompt], n: int) -> None:
        self.lm = lm
        prefix = lm.prefill(encoded)
        row_R = torch.arange(len(encoded), device=lm.device).repeat_interleave(n)
        self.hidden_RH = prefix.last_hidden_BH[row_R]
        """[R, H] hidden states that predict the next token of every row."""
        self.position_R = prefix.next_position_B[row_R]
        self.decode = DecodePass(prefix, row_R)

    def keep(self, index: Tensor) -> None:
        """Go on with the rows ``index`` alone."""
        self.position_R = self.position_R[index]
        self.decode.keep(index)

    def feed(self, token_R: Tensor) -> None:
        """Append one token to every row and move on to the next."""
        token_R1 = token_R[:, None]
        positions = self.lm.response_positions(self.position_R, 1)
        inputs = {"input_ids": token_R1, "attention_mask": no_mask(token_R1)}
        output = self.lm.run(inputs, positions, shared_prefix=self.decode)
        self.hidden_RH = output.last_hidden_state[:, -1]
        self.position_R = self.position_R + 1
        self.decode.n_fed += 1


class PlainDecoding:
    """Responses in flight, each behind its own copy of its prompt in the model's own cache."""

    def __init__(self, lm: MultimodalLM, encoded: list[EncodedPrompt], n: int) -> None:
        self.lm = lm
        prompts = lm.prepare(encoded)
        output = lm.run_prompts(prompts, use_cache=True)
        self.cache = output.past_key_values
        self.mask_RL = prompts.inputs["attention_mask"]
        self.position_R = next_position(prompts.positions)
        row_R = torch.arange(len(encoded), device=lm.device).repeat_interleave(n)
        self.hidden_RH = output.last_hidden_state[row_R, -1]
        self.keep(row_R)

    def keep(self, index: Tensor) -> None:
        self.cache.reorder_cache(index)  # the one selection of rows that every kind of layer has
        self.position_R, self.mask_RL = self.position_R[index], self.mask_RL[index]

    def feed(self, token_R: Tensor) -> None:
        self.mask_RL = torch.cat([self.mask_RL, self.mask_RL.new_ones(len(token_R), 1)], dim=1)
        output = self.lm.run(
            {"input_ids": token_R[:, None], "attention_mask": self.mask_RL},
            self.lm.response_positions(self.position_R, 1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.hidden_RH = output.last_hidden_state[:, -1]
        self.position_R = self.position_R + 1
