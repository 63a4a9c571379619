"""Attention of responses to a prompt that ran once, without a copy of the prompt's keys and values for each rollout.

transformers picks a model's attention function by name.  Ours, ``shared_prefix``, is PyTorch's scaled-dot-product
attention, unless the model's forward was given a *pass* (keyword ``shared_prefix``), which then computes it:
:class:`PrefixPass` runs prompts and keeps their keys and values, :class:`ResponsePass` runs whole responses behind
them (with gradient if need be), :class:`DecodePass` one token after the other.  No cache object is involved, so the
same passes hold under gradient checkpointing, which would throw a cache away.

A prompt's own mask (padding, images that see all of themselves, a sliding window) is made by transformers.  A response
is causal behind it; in a layer with a sliding window, token i sees the tokens from i - window + 1 to i.

B prompts, R rollouts, P prompt tokens (left-padded), T response tokens (right-padded), Q query heads, K key/value
heads (Q = K * G), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NAME = "shared_prefix"
QUERY_BLOCK = 256
"""Response tokens that attend together: what lies behind the last of them is left out instead of masked out."""
FLASH_HEAD = 256
"""Largest head that the kernel for half precision takes."""
FIRST_CAPACITY = 64
"""Response tokens that a decoding pass first has room for; it grows by doubling."""


class Pass(Protocol):
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attention output [batch, tokens, Q, D] of one layer; query [batch, Q, tokens, D], key and value
        [batch, K, tokens, D]."""
        ...


def shared_prefix_obstacle(model: PreTrainedModel) -> str | None:
    """Why this model's responses cannot attend to a shared prompt; None = they can."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{model.config.model_type} has {', '.join(sorted(kinds))} layers"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{model.config.model_type} caps its attention scores"
    if config._attn_implementation == "eager":
        return "attention: eager was asked for"
    if not model._supports_attention_backend:
        return f"{model.config.model_type} does not take an attention function"
    return None


def windows_of(config: PreTrainedConfig) -> dict[int, int | None]:
    """Layer -> the number of tokens that a token sees, itself among them; None = all before it."""
    window = getattr(config, "sliding_window", None)
    layers = range(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    return {i: window if kinds[i] == "sliding_attention" else None for i in layers}


def use_shared_prefix(model: PreTrainedModel) -> None:
    """Give the language model of ``model`` the attention function of this module; its vision tower keeps its own."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    parts = [
        k for k in model.config.sub_configs if getattr(model.config, k) is model.config.get_text_config()
    ]
    model.set_attn_implementation({parts[0]: NAME} if parts else NAME)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix: Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    attend = _plain if shared_prefix is None else shared_prefix.attend
    return attend(module, query, key, value, attention_mask, **kwargs)


def _plain(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    from transformers import AttentionInterface

    return AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)


@dataclass
class Prefix:
    """Prompts that have been run: what their responses continue from."""

    keys: dict[int, Tensor]
    """Layer -> [B, K, P, D], positions encoded; with a sliding window, of the prompt's last window - 1 tokens."""
    values: dict[int, Tensor]
    source: dict[int, int]
    """Layer -> the layer whose keys and values it reads: itself, or an earlier one."""
    mask_BP: Tensor
    """[B, P] bool, False at padding."""
    next_position_B: Tensor
    """[B] position id of the first response token (M-RoPE: the same on all three axes)."""
    last_hidden_BH: Tensor
    """[B, H] hidden state that predicts the first response token."""
    is_padded: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_padded = not bool(self.mask_BP.all())

    def rows(self, row: Tensor) -> Prefix:
        """The prompts ``row`` alone."""
        return Prefix(
            {i: k[row] for i, k in self.keys.items()},
            {i: v[row] for i, v in self.values.items()},
            self.source,
            self.mask_BP[row],
            self.next_position_B[row],
            self.last_hidden_BH[row],
        )


class PrefixPass:
    """Runs prompts as they always run, and keeps every layer's keys and values."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.source: dict[int, int] = {}
        self.windows: dict[int, int | None] = {}
        self._whole: dict[int, Tensor] = {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layer = module.layer_idx
        if layer not in self.source:  # a layer recomputed in the backward pass comes by again
            self._keep(layer, key, value, sliding_window)
        return _plain(module, query, key, value, mask, sliding_window=sliding_window, **kwargs)

    def _keep(self, layer: int, key: Tensor, value: Tensor, window: int | None) -> None:
        source = next((i for i, whole in self._whole.items() if whole is key), layer)
        self.source[layer], self.windows[layer] = source, window
        if source == layer:
            first = 0 if window is None else max(0, key.shape[2] + 1 - window)
            self._whole[layer] = key
            self.keys[layer], self.values[layer] = key[:, :, first:], value[:, :, first:]


@dataclass(frozen=True)
class Block:
    """Response tokens that attend together."""

    queries: slice
    keys: slice
    """Of the prompt's kept tokens and the response behind them: from the first to the last that one of them sees."""
    mask: Tensor | CausalBias


class ResponsePass:
    """Runs whole responses behind their prompts: exact, and gradients flow into the prompts' keys and values."""

    def __init__(self, prefix: Prefix, row_R: Tensor, n_tokens: int) -> None:
        self.prefix, self.row_R, self.n_tokens = prefix, row_R, n_tokens
        # Padding stands behind a response, where none of its tokens looks, so only the prompts' own needs a mask.
        self.prompt_RP = prefix.mask_BP[row_R] if prefix.is_padded else None
        # The kernel for half precision and a plain causal mask leaves out by itself what is masked.
        self.has_flash = prefix.keys[0].dtype != torch.float32 and row_R.is_cuda and not prefix.is_padded
        self.blocks: dict[tuple[int, int | None, bool], list[Block]] = {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        source = self.prefix.source[module.layer_idx]
        key = torch.cat([self.prefix.keys[source].index_select(0, self.row_R), key], dim=2)
        value = torch.cat([self.prefix.values[source].index_select(0, self.row_R), value], dim=2)
        n_prompt = key.shape[2] - self.n_tokens
        # A window wider than prompt and response is none.
        window = sliding_window if sliding_window is not None and sliding_window < key.shape[2] else None
        is_flash = self.has_flash and window is None and query.shape[-1] <= FLASH_HEAD
        kind = n_prompt, window, is_flash
        if kind not in self.blocks:
            self.blocks[kind] = self._make_blocks(*kind)
        # On a GPU, the other kernels cannot take grouped heads as they are and would hold all scores.
        grouped = is_flash or not query.is_cuda
        if not grouped:
            n_repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(n_repeats, dim=1) for x in (key, value))
        parts = [
            scaled_dot_product_attention(
                query[:, :, block.queries],
                key[:, :, block.keys],
                value[:, :, block.keys],
                attn_mask=block.mask,
                scale=scaling,
                enable_gqa=grouped,
            )
            for block in self.blocks[kind]
        ]
        return torch.cat(parts, dim=2).transpose(1, 2), None

    def _make_blocks(self, n_prompt: int, window: int | None, is_flash: bool) -> list[Block]:
        """What response tokens see of the prompt's last ``n_prompt`` tokens and of each other."""
        size = self.n_tokens if is_flash else QUERY_BLOCK
        blocks = []
        for start in range(0, self.n_tokens, size):
            end = min(start + size, self.n_tokens)
            first = 0 if window is None else max(0, n_prompt + start + 1 - window)
            keys = slice(first, n_prompt + end)
            blocks.append(Block(slice(start, end), keys, self._mask(end - start, keys, n_prompt, window)))
        return blocks

    def _mask(self, n_queries: int, keys: slice, n_prompt: int, window: int | None) -> Tensor | CausalBias:
        """The queries are the last tokens of the keys."""
        n_keys = keys.stop - keys.start
        if self.prompt_RP is None and window is None:
            return causal_lower_right(n_queries, n_keys)
        ahead = n_keys - n_queries
        seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=self.row_R.device).tril(ahead)
        if window is not None:
            seen = seen.triu(ahead + 1 - window)
        if self.prompt_RP is None:
            return seen
        n_dropped = self.prompt_RP.shape[1] - n_prompt
        prompt = self.prompt_RP[:, n_dropped + keys.start :]
        real = pad(prompt, (0, n_keys - prompt.shape[1]), value=True)
        return (seen & real[:, None])[:, None]


class DecodePass:
    """Runs responses token by token: the prompts are read once per group, the responses' own keys and values are
    written in place.  Without gradient."""

    def __init__(self, prefix: Prefix, row_R: Tensor) -> None:
        # Rows of a head one behind the other: the products of every step would lay them out anew otherwise.
        prefix.keys = {i: k.contiguous() for i, k in prefix.keys.items()}
        prefix.values = {i: v.contiguous() for i, v in prefix.values.items()}
        self.prefix, self.row_R = prefix, row_R
        self.n_fed = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._arrange()

    def _arrange(self) -> None:
        """Lay the rows of each prompt side by side, so that one product serves all of them."""
        n_prompts = len(self.prefix.mask_BP)
        count_B = torch.bincount(self.row_R, minlength=n_prompts)
        self.n_slots = int(count_B.max())
        first_B = count_B.cumsum(0) - count_B  # rows stay in the order of their prompts
        rank_R = torch.arange(len(self.row_R), device=self.row_R.device) - first_B[self.row_R]
        slot_R = self.row_R * self.n_slots + rank_R
        self.slot_R = None if len(slot_R) == n_prompts * self.n_slots else slot_R
        self.bias = None
        if self.prefix.is_padded:
            blocked_BP = ~self.prefix.mask_BP
            self.bias = torch.zeros(blocked_BP.shape, device=blocked_BP.device)
            self.bias = self.bias.masked_fill(blocked_BP, -torch.inf)[:, None, None]

    def keep(self, index: Tensor) -> None:
        """Go on with the rows ``index`` alone."""
        self.keys = {i: k[index, :, : self.n_fed] for i, k in self.keys.items()}
        self.values = {i: v[index, :, : self.n_fed] for i, v in self.values.items()}
        alive_B, self.row_R = self.row_R[index].unique(return_inverse=True)
        if len(alive_B) < len(self.prefix.mask_BP):
            self.prefix = self.prefix.rows(alive_B)
        self._arrange()

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layer = self.prefix.source[module.layer_idx]
        n_rows, n_query, _, size = query.shape
        n_key = key.shape[1]
        if layer == module.layer_idx:
            self._append(self.keys, layer, key)
            self._append(self.values, layer, value)
        query = (query[:, :, 0] * (size**-0.5 if scaling is None else scaling)).view(n_rows, n_key, -1, size)
        held = self.prefix.keys[layer], self.prefix.values[layer]
        n_prompt, n_own = held[0].shape[2], self.n_fed + 1
        first = 0 if sliding_window is None else max(0, n_prompt + n_own - sliding_window)
        own_range = slice(max(0, first - n_prompt), n_own)
        output, own_lse = _partial(query, *(x[layer][:, :, own_range] for x in (self.keys, self.values)))
        if first < n_prompt:
            bias = None if self.bias is None else self.bias[..., first - n_prompt :]
            partial = _partial(self._gather(query), *(x[:, :, first:] for x in held), bias)
            prompt, prompt_lse = (self._scatter(x) for x in partial)
            # Two softmaxes over parts of the keys, weighed by their normalisers, are the softmax over all keys.
            output = torch.lerp(prompt, output, torch.sigmoid(own_lse - prompt_lse))
        return output.to(value.dtype).reshape(n_rows, 1, n_query, -1), None

    def _append(self, store: dict[int, Tensor], layer: int, new: Tensor) -> None:
        """Write the new token behind everything fed so far [R, K, n_fed, D], in place."""
        held = store.get(layer)
        if held is None or held.shape[2] <= self.n_fed:
            n_rows, n_key, _, size = new.shape
            grown = new.new_empty(n_rows, n_key, max(FIRST_CAPACITY, 2 * self.n_fed), size)
            if held is not None:
                grown[:, :, : self.n_fed] = held[:, :, : self.n_fed]
            held = store[layer] = grown
        held[:, :, self.n_fed] = new[:, :, 0]

    def _gather(self, query: Tensor) -> Tensor:
        """[R, K, G, D] -> [B, K, n_slots * G, D]; slots of finished rows hold zeros."""
        _, n_key, group, size = query.shape
        if self.slot_R is not None:
            grid = query.new_zeros(len(self.prefix.mask_BP) * self.n_slots, n_key, group, size)
            query = grid.index_copy_(0, self.slot_R, query)
        return query.view(-1, self.n_slots, n_key, group, size).transpose(1, 2).flatten(2, 3)

    def _scatter(self, grid: Tensor) -> Tensor:
        """[B, K, n_slots * G, X] -> [R, K, G, X]"""
        rows = grid.unflatten(2, (self.n_slots, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.slot_R is None else rows[self.slot_R]


def _partial(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention output [..., D] over some of the keys and the log of its normaliser [..., 1], float32."""
    scores = (query @ key.transpose(-1, -2)).float()
    if bias is not None:
        scores += bias
    weights = scores.softmax(-1)
    lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return (weights.to(value.dtype) @ value).float(), lse
