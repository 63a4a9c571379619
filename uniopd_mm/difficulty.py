"""Offline, difficulty-aware balancing: how often does the student solve each prompt, and which prompts to repeat.

The student answers every prompt n times; its pass count 0..n is the prompt's difficulty.  Most prompts of a typical set
are always or never solved, and little can be learnt from them; those between are repeated until their bins are about as
large as the largest one.  Nothing is ever filtered: dropping prompts costs accuracy (arXiv 2605.03677, student side).
Pure: no file, model or random state.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["u", "mirrored_j", "neither"]

TARGET = 0.95
"""An upsampled bin reaches this share of the largest bin, as far as ``CAP`` lets it."""
CAP = 5
"""A prompt is in an epoch this often at most."""
STANDS_OUT = 1.5
"""A bin stands out when it holds this many times the mean of the bins 1..n-1 ..."""
SURE = 2.0
"""... and exceeds that mean by this many standard errors of counting."""
FALLS = -0.5
"""A histogram falls when its trend is at most this."""


class PassCount(NamedTuple):
    """What is known of one prompt."""

    n_correct: int
    n_known: int
    """Answers whose outcome is known: neither a timeout nor a failed judge, server or image."""
    n_asked: int
    """All answers."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a histogram of pass counts looks like, and the numbers that say so."""

    kind: Kind
    """u: mass at 0 and at n; mirrored_j: mass at 0, falling to n."""
    low: float
    """Prompts never solved, in means of the bins 1..n-1."""
    high: float
    """Prompts always solved, in means of the bins 1..n-1."""
    trend: float
    """-1 = falls from bin to bin, 1 = rises; see :func:`trend`."""


def pass_counts(outcomes: Iterable[Sequence[bool | None]]) -> list[PassCount]:
    """One pass count per prompt from the outcomes of its answers; None = unknown, never the same as incorrect."""
    return [
        PassCount(sum(o is True for o in row), sum(o is not None for o in row), len(row)) for row in outcomes
    ]


def bins(counts: Iterable[PassCount], n: int) -> list[int | None]:
    """The bin 0..n of each prompt; None = apart, because fewer than ``n`` of its outcomes are known.

    A pass count over fewer answers would be another measure of difficulty; such prompts are neither counted nor repeated.
    """
    return [count.n_correct if count.n_known == n else None for count in counts]


def histogram(binned: Iterable[int | None], n: int, repeats: Iterable[int] | None = None) -> list[int]:
    """Prompts in each bin 0..n, those apart left out; with ``repeats``, each as often as it is in an epoch."""
    sizes = [0] * (n + 1)
    binned = list(binned)
    for count, times in zip(binned, [1] * len(binned) if repeats is None else repeats, strict=True):
        if count is not None:
            sizes[count] += times
    return sizes


def trend(sizes: Sequence[int]) -> float:
    """Sum over all pairs of bins of (later - earlier), divided by the sum of the absolute values: in [-1, 1].

    The ups and downs of small bins weigh little.  0 for a flat histogram.
    """
    steps = [later - earlier for i, earlier in enumerate(sizes) for later in sizes[i + 1 :]]
    total = sum(map(abs, steps))
    return sum(steps) / total if total else 0.0


def shape_of(sizes: Sequence[int]) -> Shape:
    """The shape of a histogram with bins 0..n, n >= 2.

    u: bin 0 and bin n stand out of the bins between.  mirrored_j: bin 0 stands out, bin n does not, and the histogram
    falls.  Few prompts, whose bins differ by chance, are neither.
    """
    if len(sizes) < 3:
        raise ValueError(
            f"a shape needs at least 2 answers per prompt (3 bins), found {len(sizes)} bins; raise --samples"
        )
    inner = sizes[1:-1]
    mean = sum(inner) / len(inner)
    low, high = _stands_out(sizes[0], mean, len(inner)), _stands_out(sizes[-1], mean, len(inner))
    slope = trend(sizes)
    kind: Kind = "u" if low and high else "mirrored_j" if low and slope <= FALLS else "neither"
    return Shape(kind, _ratio(sizes[0], mean), _ratio(sizes[-1], mean), slope)


def upsampled(kind: Kind, n: int) -> range:
    """The bins whose prompts are repeated: 1..n-1 of a U, 1..n of a mirrored J, none of anything else."""
    return {"u": range(1, n), "mirrored_j": range(1, n + 1), "neither": range(0)}[kind]


def bin_total(size: int, largest: int, target: float = TARGET, cap: int = CAP) -> int:
    """Prompts, repeats counted, that an upsampled bin of ``size`` prompts holds afterwards: never fewer than before."""
    return min(cap * size, max(size, round(target * largest)))


def repeats(
    binned: Sequence[int | None], kind: Kind, n: int, seed: int = 0, target: float = TARGET, cap: int = CAP
) -> list[int]:
    """How often each prompt is in an epoch: 1..``cap``, 1 where nothing is upsampled and for prompts apart.

    Within a bin the numbers differ by 1 at most; who gets the one more is drawn with ``seed``.
    """
    times = [1] * len(binned)
    largest = max(histogram(binned, n))
    for count in upsampled(kind, n):
        members = [i for i, found in enumerate(binned) if found == count]
        if not members:
            continue
        each, extra = divmod(bin_total(len(members), largest, target, cap), len(members))
        lucky = set(random.Random(f"repeats/{seed}/{count}").sample(members, extra))
        for i in members:
            times[i] = each + (i in lucky)
    return times


def _stands_out(size: int, mean: float, n_inner: int) -> bool:
    """Counts scatter by their square root; the mean of ``n_inner`` bins by that much less."""
    error = math.sqrt(size + mean / n_inner)
    return size >= STANDS_OUT * mean and size - mean >= SURE * error and size > 0


def _ratio(size: int, mean: float) -> float:
    return size / mean if mean else math.inf if size else 0.0
