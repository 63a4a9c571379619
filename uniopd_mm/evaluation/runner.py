"""Answer held-out prompts, verify the answers, summarise them; the ranks share the prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from uniopd_mm.config import SamplingConfig
from uniopd_mm.distributed import World
from uniopd_mm.engines import Engine, encode_groups
from uniopd_mm.errors import DataError
from uniopd_mm.processors import VLMProcessor
from uniopd_mm.prompts import open_images
from uniopd_mm.rollout import Outcome, Prompt
from uniopd_mm.verifiers import VerifierPool

EVALUATION_SEED = 1_000_003
"""Keeps the random numbers of evaluation apart from those of training."""


@dataclass(frozen=True)
class Sample:
    """One answer to one held-out prompt."""

    id: str
    domain: str
    index: int
    """Which of the n answers to this prompt."""
    text: str
    answer: str | list[str] | None
    outcome: Outcome
    n_tokens: int
    finish: str


def evaluate(
    engine: Engine,
    processor: VLMProcessor,
    prompts: Sequence[Prompt],
    verifiers: VerifierPool,
    sampling: SamplingConfig,
    world: World,
    n: int = 1,
    batch: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """All samples, in the order of ``prompts``, on every rank.

    A prompt whose images cannot be opened, or an answer that a server failed to give, is *unknown*, with the reason.  ``progress`` gets (done, total) prompts of
    this rank.
    """
    mine = world.share(len(prompts))
    samples: list[Sample] = []
    for start in range(mine.start, mine.stop, batch):
        indices = range(start, min(start + batch, mine.stop))
        samples += _answer(engine, processor, {i: prompts[i] for i in indices}, verifiers, sampling, n, seed)
        if progress:
            progress(indices.stop - mine.start, len(mine))
    return world.gather(samples)


def _answer(
    engine: Engine,
    processor: VLMProcessor,
    prompts: dict[int, Prompt],
    verifiers: VerifierPool,
    sampling: SamplingConfig,
    n: int,
    seed: int,
) -> list[Sample]:
    groups, failed = {}, {}
    for slot, prompt in prompts.items():
        try:
            (groups[slot],) = encode_groups([(slot, prompt, open_images(prompt))], processor)
        except DataError as error:
            failed[slot] = Outcome(correct=None, reason=str(error))
    answered = engine.sample(list(groups.values()), n, sampling, (EVALUATION_SEED, seed))
    texts = [(g.prompt, r.text) for g in answered for r in g.rollouts]
    outcomes = iter(verifiers.check(texts))
    done = {g.slot: g.rollouts for g in answered}
    lost = Outcome(correct=None, reason="; ".join(dict.fromkeys(engine.failed)) or "not answered")
    samples = []
    for slot, prompt in prompts.items():
        common = {"id": prompt.id, "domain": prompt.domain, "answer": prompt.answer}
        rollouts = done.get(slot, ())
        samples += [
            Sample(
                **common,
                index=i,
                text=rollout.text,
                outcome=next(outcomes),
                n_tokens=len(rollout.response_ids),
                finish=rollout.finish,
            )
            for i, rollout in enumerate(rollouts)
        ]
        samples += [
            Sample(**common, index=i, text="", outcome=failed.get(slot, lost), n_tokens=0, finish="error")
            for i in range(len(rollouts), n)
        ]
    return samples


def summarise(samples: Sequence[Sample]) -> dict[str, float]:
    """Metrics ``eval/...``: accuracy over known outcomes, overall and per domain, and what to distrust it by."""
    if not samples:
        return {}
    metrics = {"eval/n": float(len(samples))}
    for domain in [None, *sorted({s.domain for s in samples})]:
        known = [s for s in samples if s.outcome.correct is not None and domain in (None, s.domain)]
        if known:
            key = "eval/accuracy" if domain is None else f"eval/{domain}/accuracy"
            metrics[key] = sum(bool(s.outcome.correct) for s in known) / len(known)
    n = len(samples)
    metrics["eval/unknown_share"] = sum(s.outcome.correct is None for s in samples) / n
    metrics["eval/unparsed_share"] = (
        sum(s.outcome.correct is False and s.outcome.extracted is None for s in samples) / n
    )
    metrics["eval/truncated_share"] = sum(s.finish == "length" for s in samples) / n
    metrics["eval/length"] = sum(s.n_tokens for s in samples) / n
    return metrics


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """One JSON line per sample; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".tmp")
    with open(partial, "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
    os.replace(partial, path)
