"""Evaluation during training: answer held-out prompts, verify the answers, summarise them; the ranks share the prompts.

The answers and outcomes are those that ``eval/run.py`` finds for the same weights, rows, sampling and seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from uniopd_mm.config import SamplingConfig
from uniopd_mm.distributed import World
from uniopd_mm.engines import Engine
from uniopd_mm.errors import UniOPDError
from uniopd_mm.evaluation.generate import answer, score
from uniopd_mm.evaluation.results import Scored
from uniopd_mm.evaluation.samples import Sample, write_whole
from uniopd_mm.processors import VLMProcessor
from uniopd_mm.rollout import Prompt
from uniopd_mm.verifiers import VerifierPool


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
) -> list[Scored]:
    """``n`` samples of every prompt, in the order of ``prompts``, on every rank.

    A prompt whose images cannot be opened, or an answer that a server failed to give, is *unknown*, with the reason.
    """
    samples: list[Sample] = []
    with world.together(UniOPDError):
        mine = prompts[world.rank :: world.size]
        wanted = {prompt.id: range(n) for prompt in mine}
        answer(engine, processor, "eval", mine, wanted, sampling, seed, samples.extend, batch)
        outcomes = score(mine, samples, verifiers)
    scored = world.gather(Scored(s, o) for s, o in zip(samples, outcomes, strict=True))
    place = {prompt.id: i for i, prompt in enumerate(prompts)}
    return sorted(scored, key=lambda one: (place[one.sample.id], one.sample.index))


def summarise(prompts: Sequence[Prompt], scored: Sequence[Scored]) -> dict[str, float]:
    """Metrics ``eval/...``: accuracy over known outcomes, overall and per domain, and what to distrust it by."""
    if not scored:
        return {}
    domains = {prompt.id: prompt.domain for prompt in prompts}
    metrics = {"eval/n": float(len(scored))}
    for domain in [None, *sorted({domains[one.sample.id] for one in scored})]:
        known = [
            one
            for one in scored
            if one.outcome.correct is not None and domain in (None, domains[one.sample.id])
        ]
        if known:
            key = "eval/accuracy" if domain is None else f"eval/{domain}/accuracy"
            metrics[key] = sum(bool(one.outcome.correct) for one in known) / len(known)
    n = len(scored)
    metrics["eval/unknown_share"] = sum(one.state == "unknown" for one in scored) / n
    metrics["eval/unparsed_share"] = sum(one.state == "unparsed" for one in scored) / n
    metrics["eval/truncated_share"] = sum(one.sample.finish == "length" for one in scored) / n
    metrics["eval/length"] = sum(one.sample.n_tokens for one in scored) / n
    return metrics


def write_scored(path: Path, prompts: Sequence[Prompt], scored: Sequence[Scored]) -> None:
    """One JSON line per sample with its gold and outcome; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    by_id = {prompt.id: prompt for prompt in prompts}
    lines = []
    for one in scored:
        prompt, sample = by_id[one.sample.id], asdict(one.sample)
        del sample["benchmark"]
        row = {**sample, "domain": prompt.domain, "answer": prompt.answer, "outcome": asdict(one.outcome)}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))
