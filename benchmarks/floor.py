"""How fast a step could be: its matrix products without any duplicate, each timed alone in its own shape.

Needed, per step: every picture and every prompt once through each of the sampler, the teacher and the update; every
response token once through each; gradients once.  Sampling and the update each run the student, although the weights are
the same, since a sampler does not keep what a gradient needs.  Attention counts only what a causal mask lets through,
at the rate of a large product.  Everything else (softmax, norms, activations, the optimizer, copies) counts as free, so
no implementation reaches the floor.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from models import PATCH, SIZES, Size, Tower
from torch.profiler import ProfilerActivity, profile

Product = tuple[int, int, int]
"""[m, k] times [k, n]."""


@dataclass
class Work:
    """Matrix products and how often each is done, and attention apart from them."""

    products: Counter[Product]
    attention_flops: float

    @property
    def flops(self) -> float:
        return (
            sum(2.0 * m * k * n * times for (m, k, n), times in self.products.items()) + self.attention_flops
        )

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.attention_flops + other.attention_flops)

    def times(self, count: int) -> Work:
        """The same, ``count`` times over."""
        products = Counter({product: n * count for product, n in self.products.items()})
        return Work(products, self.attention_flops * count)

    def with_backward(self) -> Work:
        """And the gradients of both factors; attention's backward pass is taken as twice its forward pass."""
        products = Counter(self.products)
        for (m, k, n), times in self.products.items():
            products[m, n, k] += times
            products[k, m, n] += times
        return Work(products, 3 * self.attention_flops)


def needed_work(case: Case, prompt_tokens: int) -> Work:
    """Products of one step; ``prompt_tokens`` is the mean over prompts, the picture's tokens included."""
    student = SIZES[case.size]
    teacher = SIZES[student.teacher]
    rows, last = case.prompts * case.n, case.response - 1  # the last token is sampled, but never fed
    decoding = Work(Counter(), 0.0)
    for t in range(last):
        decoding += _language(student.text, rows, context=prompt_tokens + t + 1)
    head = (student.text.hidden, student.vocabulary)
    decoding += Work(Counter({(rows, *head): last, (case.prompts, *head): 1}), 0.0)

    def scoring(size: Size, groups: int) -> Work:
        prompt = _prompt(size, case.image_tokens, prompt_tokens, groups)
        context = prompt_tokens + case.response / 2
        response = _language(size.text, groups * case.n * last, context)
        product = (groups * case.n * case.response, size.text.hidden, student.vocabulary)
        return prompt + response + Work(Counter({product: 1}), 0.0)

    sampling = _prompt(student, case.image_tokens, prompt_tokens, case.prompts) + decoding
    # One group at a time is updated, as both systems are told to.
    return sampling + scoring(teacher, case.prompts) + scoring(student, 1).with_backward().times(case.prompts)


def _prompt(size: Size, image_tokens: int, prompt_tokens: int, prompts: int) -> Work:
    """Vision tower (all layers but the last, whose output nobody reads), projector, language model."""
    text, vision = size.text, size.vision
    patches = image_tokens + 1  # and CLIP's class token
    layers = Tower(vision.hidden, vision.layers - 1, vision.heads, vision.kv_heads, vision.ffn)
    embed = Counter({(prompts * image_tokens, 3 * PATCH**2, vision.hidden): 1})
    project = Counter({(prompts * image_tokens, k, text.hidden): 1 for k in (vision.hidden, text.hidden)})
    return (
        Work(embed + project, 0.0)
        + _layers(layers, prompts * patches, context=patches, mlp_in=1)
        + _language(text, prompts * prompt_tokens, context=prompt_tokens / 2)
    )


def _language(text: Tower, tokens: int, context: float) -> Work:
    return _layers(text, tokens, context, mlp_in=2)


def _layers(tower: Tower, tokens: int, context: float, mlp_in: int) -> Work:
    """``tokens`` that attend to ``context`` positions each; ``mlp_in`` 2 = a gated MLP."""
    width, kv_width = tower.hidden, tower.hidden // tower.heads * tower.kv_heads
    products: Counter[Product] = Counter()
    products[tokens, width, width] += 2 * tower.layers  # queries, output
    products[tokens, width, kv_width] += 2 * tower.layers
    products[tokens, width, tower.ffn] += mlp_in * tower.layers
    products[tokens, tower.ffn, width] += tower.layers
    return Work(products, 4.0 * tokens * context * width * tower.layers)


# ------------------------------------------------------------------ time


def floor_seconds(work: Work) -> dict[str, float]:
    """Seconds of the products in their own shapes, and of as many operations in one large product."""
    large = product_seconds((2048, 2048, 2048))
    rate = 2.0 * 2048**3 / large
    own = sum(product_seconds(product) * times for product, times in work.products.items())
    return {
        "needed_gflop": work.flops / 1e9,
        "own_shapes_s": own + work.attention_flops / rate,
        "large_product_s": work.flops / rate,
        "large_product_gflops": rate / 1e9,
    }


def product_seconds(product: Product, at_least_s: float = 0.05, at_least_rounds: int = 3) -> float:
    """CPU seconds of one product in fp32, into memory that is there already: the fastest of a few rounds."""
    m, k, n = product
    left, right, out = torch.randn(m, k), torch.randn(n, k).T, torch.empty(m, n)
    repeats = max(1, int(1e8 / (m * k * n)))
    rounds: list[float] = []
    while sum(rounds) * repeats < at_least_s or len(rounds) < at_least_rounds:
        start = time.process_time()
        for _ in range(repeats):
            torch.mm(left, right, out=out)
        rounds.append((time.process_time() - start) / repeats)
    return min(rounds)


# ------------------------------------------------------------------ operations of a real step


def flop_profile() -> profile:
    """Records a step for :func:`count_flops`; a context manager."""
    return profile(activities=[ProfilerActivity.CPU], record_shapes=True)


def count_flops(recorded: profile) -> int:
    """Operations of all matrix products, convolutions and fused attention, backward passes included; nothing else.

    Fused attention counts whole, although a causal mask may save it half.
    """
    total = 0
    for event in recorded.key_averages(group_by_input_shape=True):
        name = event.key.removeprefix("aten::").removesuffix("_")
        if name in FLOPS:
            total += event.count * FLOPS[name](*event.input_shapes)
    return total


def _product(left: list[int], right: list[int], *_: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _added_product(_bias: list[int], left: list[int], right: list[int], *_: Any) -> int:
    return _product(left, right)


def _convolution(picture: list[int], kernel: list[int], *_: Any) -> int:
    """Of patches that do not overlap."""
    return 2 * math.prod(picture) * kernel[0]


def _convolution_backward(_grad: list[int], picture: list[int], kernel: list[int], *_: Any) -> int:
    return _convolution(picture, kernel)  # for the kernel; nobody wants a picture's gradient


def _attention(query: list[int], key: list[int], value: list[int], *_: Any) -> int:
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward(_grad: list[int], query: list[int], key: list[int], value: list[int], *_: Any) -> int:
    return _attention(query, key, value) * 5 // 2  # the scores again, and four products


FLOPS: dict[str, Callable[..., int]] = {
    "mm": _product,
    "bmm": _product,
    "addmm": _added_product,
    "baddbmm": _added_product,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
"""From the shapes of an operator's inputs."""
