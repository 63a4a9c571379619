"""Drawing tokens: the right ones, from the right distribution, the same in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uniopd_mm.config import SamplingConfig
from uniopd_mm.engines.sampling import BLOCK, draw, rollout_uniforms, sample_tokens

LAST = float(np.nextafter(1.0, 0.0))
SIZES = st.integers(1, 3 * BLOCK + 5)


def plain_draw(weights: torch.Tensor, uniform: float) -> int:
    """The first token whose cumulative weight exceeds the draw, in float64."""
    cdf = weights.double().cumsum(0)
    return int((cdf > uniform * cdf[-1]).nonzero()[0])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_draw_is_that_of_the_plain_inverse_cdf(data: st.DataObject) -> None:
    n = data.draw(SIZES)
    # Small whole numbers: sums are exact in any order.
    weights = torch.tensor(
        data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), dtype=torch.float32
    )
    if not weights.any():
        weights[data.draw(st.integers(0, n - 1))] = 1.0
    uniform = data.draw(st.floats(0, LAST))
    token = int(draw(weights[None], torch.tensor([uniform], dtype=torch.float64))[0])
    assert weights[token] > 0
    assert token == plain_draw(weights, uniform)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), SIZES, st.sampled_from([0.0, 0.3, LAST]))
def test_whatever_rounding_does_a_token_without_weight_is_never_drawn(
    seed: int, n: int, uniform: float
) -> None:
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, n, generator=make) * 20
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * (torch.rand(8, n, generator=make) < 0.2)
    weights[:, torch.randint(n, (1,), generator=make)] += 1e-30
    tokens = draw(weights, torch.full((8,), uniform, dtype=torch.float64))
    assert ((tokens >= 0) & (tokens < n)).all()
    assert (weights.gather(1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize(
    "settings_", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 50}, {"temperature": 0}]
)
def test_a_row_is_drawn_as_it_is_alone(settings_: dict[str, float]) -> None:
    make = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(7, 1000, generator=make) * 3, torch.rand(7, generator=make).double()
    suppressed, sampling = torch.tensor([3, 999]), SamplingConfig(**settings_)
    together = sample_tokens(logits, uniform, sampling, suppressed)
    for r in range(7):
        alone = sample_tokens(logits[r : r + 1], uniform[r : r + 1], sampling, suppressed)
        assert together[0][r] == alone[0][0] and together[1][r] == alone[1][0]


def test_logprobs_are_those_of_the_whole_distribution() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 4
    sampling = SamplingConfig(temperature=0.5, top_k=3)
    tokens, logprobs = sample_tokens(logits, torch.full((5,), 0.5).double(), sampling, torch.tensor([1, 2]))
    wanted = (logits / 0.5).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, wanted)


def test_random_numbers_belong_to_the_rollout() -> None:
    a = rollout_uniforms((0, 5), slot=2, index=1, n=10)
    assert (a == rollout_uniforms((0, 5), slot=2, index=1, n=20)[:10]).all()
    others = [((1, 5), 2, 1), ((0, 6), 2, 1), ((0, 5), 3, 1), ((0, 5), 2, 2)]
    assert all((rollout_uniforms(s, slot, i, 10) != a).all() for s, slot, i in others)
