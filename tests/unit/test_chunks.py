"""Which rollouts run together."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniopd_mm.models import plan_chunks

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@given(LENGTHS, st.integers(1, 300), st.integers(1, 20))
def test_every_rollout_runs_once_in_chunks_that_fit(
    lengths: list[int], max_tokens: int, at_least: int
) -> None:
    if at_least > len(lengths):
        with pytest.raises(ValueError, match="cannot make"):
            plan_chunks(lengths, max_tokens, at_least)
        return
    chunks = [chunk.tolist() for chunk in plan_chunks(lengths, max_tokens, at_least)]
    assert sorted(r for chunk in chunks for r in chunk) == list(range(len(lengths)))
    assert len(chunks) >= at_least
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * max(lengths[r] for r in chunk) <= max_tokens


@given(LENGTHS, st.integers(1, 300))
def test_rollouts_of_like_length_run_together_the_longest_last(lengths: list[int], max_tokens: int) -> None:
    chunks = [[lengths[r] for r in chunk.tolist()] for chunk in plan_chunks(lengths, max_tokens)]
    assert all(max(a) <= min(b) for a, b in pairwise(chunks))


def test_what_fits_is_one_chunk() -> None:
    assert [c.tolist() for c in plan_chunks([3, 1, 2], max_tokens=9)] == [[0, 1, 2]]
