"""Log-probabilities of given tokens without ever holding [positions, vocabulary].

Positions are projected onto the vocabulary chunk by chunk.  For a plain linear head the gradient is computed by hand:
towards the hidden states already in the forward pass, towards the head from one chunk at a time, recomputed.  Any
other head (adapters, partitioned weights, hooks) is run as the module it is, under torch's checkpointing.

M positions, H hidden size, V vocabulary, K most likely tokens.  Log-probabilities and entropies in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from uniopd_mm.errors import AlignmentError

CHUNK_LOGITS = 2**24
"""Logits held at once: 64 MiB in fp32."""
CHUNK_ROWS = 512
"""Positions of a chunk at the least: over a large vocabulary, products of fewer rows are slow."""


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """What one pass over the vocabulary says about every position; only ``logprob_M`` carries a gradient."""

    logprob_M: Tensor
    """log p(target) [M] float32 nats (float64 from a float64 head)."""
    entropy_M: Tensor | None = None
    """Entropy of the whole distribution [M], nats."""
    top_ids_MK: Tensor | None = None
    """The K most likely tokens [M, K] int64, most likely first."""
    top_logprobs_MK: Tensor | None = None
    """Their log-probabilities [M, K]."""


def token_logprobs(
    hidden_MH: Tensor,
    head: nn.Module,
    target_M: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log p(target) [M] float32 nats from last hidden states; see :func:`token_statistics`."""
    return token_statistics(hidden_MH, head, target_M, temperature, softcap).logprob_M


def token_statistics(
    hidden_MH: Tensor,
    head: nn.Module,
    target_M: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    *,
    entropy: bool = False,
    top_k: int = 0,
) -> TokenStatistics:
    """log p(target) and, without gradient, entropy and the ``top_k`` most likely tokens, all at ``temperature``.

    ``head`` is the output embedding; ``softcap`` bounds its logits by tanh, as Gemma does.  A target outside its
    vocabulary is an :class:`AlignmentError`.  Differentiable once.  Under ZeRO-3 every rank must call this equally
    often; where gradients are on, each with its own M.
    """
    n_vocabulary = _vocabulary_size(head)
    _check_targets(target_M, n_vocabulary)
    n_chunks = _count_chunks(hidden_MH, n_vocabulary, head)
    if _is_plain_linear(head):
        tensors = (hidden_MH, head.weight, head.bias)
        if not torch.is_grad_enabled():  # a Function goes by requires_grad alone
            tensors = tuple(None if t is None else t.detach() for t in tensors)
        return TokenStatistics(
            *_LinearStatistics.apply(*tensors, target_M, temperature, n_chunks, entropy, top_k, softcap)
        )
    recompute = torch.is_grad_enabled() and n_chunks > 1
    pieces = []
    for rows, ids in zip(hidden_MH.tensor_split(n_chunks), target_M.tensor_split(n_chunks), strict=True):
        arguments = (rows, head, ids, temperature, softcap, entropy, top_k)
        if recompute:
            pieces.append(checkpoint(_module_statistics, *arguments, use_reentrant=False))
        else:
            pieces.append(_module_statistics(*arguments))
    return _concatenate(pieces)


# ---------------------------------------------------------------------- before the pass


def _vocabulary_size(head: Any) -> int:
    return getattr(head, "out_features", None) or head.weight.shape[0]


def _check_targets(target_M: Tensor, n_vocabulary: int) -> None:
    if not len(target_M):
        return
    low, high = (int(bound) for bound in torch.aminmax(target_M))
    if low < 0 or high >= n_vocabulary:
        raise AlignmentError(
            f"Token ids from {low} to {high} were to be scored, the head knows 0 to {n_vocabulary - 1}. "
            "Encode responses with the processor of the model that scores them."
        )


def _count_chunks(hidden_MH: Tensor, n_vocabulary: int, head: nn.Module) -> int:
    """Chunks of CHUNK_LOGITS logits or CHUNK_ROWS positions; at least one, so that no positions still give a graph."""
    n_chunks = max(1, -(-len(hidden_MH) // max(CHUNK_ROWS, CHUNK_LOGITS // n_vocabulary)))
    # ZeRO-3 gathers the head in every call of it, and all ranks must join.  Without gradients ranks score at their
    # own pace, on weights gathered beforehand.
    if torch.is_grad_enabled() and _is_partitioned(head) and dist.is_available() and dist.is_initialized():
        most = torch.tensor(n_chunks, device=hidden_MH.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        n_chunks = int(most)
    return n_chunks


def _is_partitioned(head: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 owns the parameters: they are whole only while the module itself runs."""
    return any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def _is_plain_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling ``head`` is its weight, its bias and nothing else (subclasses, hooks, replaced forwards)."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and not _is_partitioned(head)
        and not any(getattr(head, name) for name in hooks)
        and "forward" not in vars(head)
    )


# ---------------------------------------------------------------------- one chunk


def _reduce_(
    logits_MV: Tensor, target_M: Tensor, entropy: bool, top_k: int
) -> tuple[TokenStatistics, Tensor, Tensor]:
    """Statistics, exponentials [M, V] (in the place of the logits) and their sums [M, 1]; softmax = the quotient."""
    top = logits_MV.topk(top_k) if top_k else None
    peak_M1 = logits_MV.amax(-1, keepdim=True)
    chosen_M1 = logits_MV.gather(-1, target_M[:, None]) - peak_M1
    exps_MV = logits_MV.sub_(peak_M1).exp_()
    total_M1 = exps_MV.sum(-1, keepdim=True)
    log_total_M1 = total_M1.log()
    statistics = TokenStatistics(
        (chosen_M1 - log_total_M1)[:, 0],
        log_total_M1[:, 0] + torch.special.entr(exps_MV).sum(-1) / total_M1[:, 0] if entropy else None,
        top.indices if top else None,
        top.values - peak_M1 - log_total_M1 if top else None,
    )
    return statistics, exps_MV, total_M1


def _module_statistics(
    hidden_MH: Tensor,
    head: nn.Module,
    target_M: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    top_k: int,
) -> TokenStatistics:
    logits_MV = _widen(head(hidden_MH))
    if softcap is not None:
        logits_MV = softcap * torch.tanh(logits_MV / softcap)
    if temperature != 1.0:
        logits_MV = logits_MV / temperature
    logprob_M = logits_MV.gather(-1, target_M[:, None])[:, 0] - logits_MV.logsumexp(-1)
    if not entropy and not top_k:
        return TokenStatistics(logprob_M)
    rest, _, _ = _reduce_(logits_MV.detach().clone(), target_M, entropy, top_k)
    return TokenStatistics(logprob_M, rest.entropy_M, rest.top_ids_MK, rest.top_logprobs_MK)


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _concatenate(pieces: list[TokenStatistics]) -> TokenStatistics:
    def joined(parts: list[Tensor | None]) -> Tensor | None:
        tensors = [part for part in parts if part is not None]
        return torch.cat(tensors) if tensors else None

    return TokenStatistics(
        torch.cat([piece.logprob_M for piece in pieces]),
        joined([piece.entropy_M for piece in pieces]),
        joined([piece.top_ids_MK for piece in pieces]),
        joined([piece.top_logprobs_MK for piece in pieces]),
    )


# ---------------------------------------------------------------------- the plain linear head


class _LinearStatistics(torch.autograd.Function):
    """Per position, d log p(target) / d logits = one_hot(target) - softmax, whatever the incoming gradient (times the
    slope of a soft cap).

    So the forward pass, which has the softmax at hand, also takes it through the weight to d log p / d hidden [M, H].
    Only the head's own gradient needs it again: kept if there is one chunk, else recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_M: Tensor,
        temperature: float,
        n_chunks: int,
        entropy: bool,
        top_k: int,
        softcap: float | None = None,
    ) -> tuple[Tensor | None, ...]:
        to_hidden, to_head = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        pieces, slopes, kept_MV = [], [], None
        for rows, ids in zip(hidden_MH.tensor_split(n_chunks), target_M.tensor_split(n_chunks), strict=True):
            logits, slope = _linear_logits(rows, weight_VH, bias_V, temperature, softcap)
            statistics, exps, total = _reduce_(logits, ids, entropy, top_k)
            pieces.append(statistics)
            if to_hidden or (to_head and n_chunks == 1):
                residual = _residual_(exps, total, ids, slope, weight_VH.dtype)
                if to_hidden:
                    slopes.append(residual @ weight_VH)
                kept_MV = residual if to_head and n_chunks == 1 else None
                del residual
            del logits, exps, slope  # before the next chunk is made
        inputs = (hidden_MH, weight_VH, bias_V, target_M) if to_head else (None,) * 4
        ctx.save_for_backward(*inputs, torch.cat(slopes) if to_hidden else None, kept_MV)
        ctx.temperature, ctx.softcap, ctx.n_chunks = temperature, softcap, n_chunks
        whole = _concatenate(pieces)
        rest = (whole.entropy_M, whole.top_ids_MK, whole.top_logprobs_MK)
        ctx.mark_non_differentiable(*(values for values in rest if values is not None))
        return whole.logprob_M, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        slope_MH = ctx.saved_tensors[4]
        scale_M1 = -grad_M[:, None] / ctx.temperature  # minus: the residual is softmax - one_hot
        d_hidden = (scale_M1 * slope_MH).to(slope_MH.dtype) if ctx.needs_input_grad[0] else None
        d_weight, d_bias = _head_gradients(ctx, scale_M1) if any(ctx.needs_input_grad[1:3]) else (None, None)
        return d_hidden, d_weight, d_bias, *(None,) * 6


def _linear_logits(
    hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits over temperature [M, V], and the slope of the soft cap there [M, V]."""
    logits_MV, slope_MV = _widen(linear(hidden_MH, weight_VH, bias_V)), None
    if softcap is not None:
        logits_MV = logits_MV.div_(softcap).tanh_()
        slope_MV = 1 - logits_MV.square()
        logits_MV = logits_MV.mul_(softcap)
    return logits_MV if temperature == 1.0 else logits_MV.div_(temperature), slope_MV


def _residual_(
    exps_MV: Tensor, total_M1: Tensor, target_M: Tensor, slope_MV: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """softmax - one_hot(target) [M, V] in the place of the exponentials, times the slope, then in ``dtype``."""
    minus_one_M1 = torch.full_like(total_M1, -1.0)
    # Subtracted before the cast: in bf16 nothing would be left of 1 - p of a token that is almost certain.
    residual_MV = exps_MV.div_(total_M1).scatter_add_(1, target_M[:, None], minus_one_M1)
    return (residual_MV if slope_MV is None else residual_MV.mul_(slope_MV)).to(dtype)


def _head_gradients(ctx: Any, scale_M1: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Towards weight [V, H] and bias [V] as far as they train, summed over chunks in fp32."""
    hidden_MH, weight_VH, bias_V, target_M, _, kept_MV = ctx.saved_tensors
    dtype = weight_VH.dtype if ctx.n_chunks == 1 else torch.promote_types(weight_VH.dtype, torch.float32)
    d_weight = torch.zeros_like(weight_VH, dtype=dtype) if ctx.needs_input_grad[1] else None
    d_bias = torch.zeros_like(bias_V, dtype=dtype) if ctx.needs_input_grad[2] else None
    chunks = zip(*(t.tensor_split(ctx.n_chunks) for t in (hidden_MH, target_M, scale_M1)), strict=True)
    for rows, ids, scale in chunks:
        residual = kept_MV  # also lets go of the last chunk's
        if residual is None:
            logits, slope = _linear_logits(rows, weight_VH, bias_V, ctx.temperature, ctx.softcap)
            _, exps, total = _reduce_(logits, ids, entropy=False, top_k=0)
            residual = _residual_(exps, total, ids, slope, weight_VH.dtype)
            del logits, exps, slope
        if d_weight is not None:
            # The rows are scaled, not the residual: a kept one stays as it is for another backward pass.
            scaled = (scale * rows).to(weight_VH.dtype)
            if d_weight.dtype == scaled.dtype:
                d_weight.addmm_(residual.t(), scaled)
            else:
                d_weight += residual.t() @ scaled
        if d_bias is not None:
            d_bias += residual.t() @ scale[:, 0].to(residual.dtype)
    return (
        None if d_weight is None else d_weight.to(weight_VH.dtype),
        None if d_bias is None else d_bias.to(weight_VH.dtype),
    )
