"""Log-probabilities of given tokens without holding [positions, vocabulary] in fp32.

M positions, H hidden size, V vocabulary.  Log-probabilities in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**26
"""Logits held at once: 256 MiB in fp32."""


def token_logprobs(hidden_MH: Tensor, head: nn.Module, target_M: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) [M] float32 from last hidden states; positions are projected chunk by chunk, and the projection
    is recomputed in the backward pass when there is more than one chunk."""
    vocabulary = getattr(head, "out_features", None) or head.weight.shape[0]
    chunk = max(1, CHUNK_LOGITS // vocabulary)
    if len(target_M) <= chunk:
        return _piece(hidden_MH, head, target_M, temperature)
    pieces = []
    for hidden, target in zip(hidden_MH.split(chunk), target_M.split(chunk), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_piece, hidden, head, target, temperature, use_reentrant=False))
        else:
            pieces.append(_piece(hidden, head, target, temperature))
    return torch.cat(pieces)


def _piece(hidden: Tensor, head: nn.Module, target: Tensor, temperature: float) -> Tensor:
    logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)
