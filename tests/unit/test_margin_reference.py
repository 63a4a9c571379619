"""Margin calibration against 60 reference cases (float64), on one process and spread over two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from uniopd_mm.advantages import calibrate
from uniopd_mm.config import CalibrationConfig

FIXTURE = Path(__file__).parents[1] / "fixtures" / "margin_calibration_reference.jsonl"
CASES = [json.loads(line) for line in FIXTURE.read_text(encoding="utf-8").splitlines()]
DIRECTIONS = {"correct_up": "lift", "incorrect_down": "lower", "both": "spread"}
CODES = {True: 1, False: 0, None: -1}


def settings_of(case: dict[str, Any]) -> CalibrationConfig:
    if case["kind"] == "shift":
        extra = {"direction": DIRECTIONS[case["direction"]]}
    else:
        extra = {"mask": "greedy", "min_retain": case["min_retain_ratio"]}
    return CalibrationConfig(
        kind=case["kind"], scope=case["scope"], margin=case["mode"], delta=case["delta"], **extra
    )


def padded(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Rows as [B, T] float64 with nan in the padding, and which positions are real."""
    values = [torch.tensor(row, dtype=torch.float64) for row in rows]
    advantages_BT = pad_sequence(values, batch_first=True, padding_value=float("nan"))
    scored_BT = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in values], batch_first=True)
    return advantages_BT, scored_BT


def calibrated(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    advantages_BT, scored_BT = padded(case["advantages"])
    outcome_B = torch.tensor([CODES[c] for c in case["correct"]], dtype=torch.int8)
    after_BT, kept_B, _ = calibrate(
        advantages_BT, scored_BT, outcome_B, torch.tensor(case["group"]), settings_of(case)
    )
    return after_BT, kept_B


def test_the_reference_has_sixty_cases_of_every_kind_scope_and_margin() -> None:
    assert len(CASES) == 60
    assert len({(c["kind"], c["scope"], c["mode"]) for c in CASES}) == 8
    assert {c["direction"] for c in CASES if c["kind"] == "shift"} == set(DIRECTIONS)


@pytest.mark.parametrize("number", range(60))
def test_calibrated_advantages_match_the_reference(number: int) -> None:
    case = CASES[number]
    after_BT, kept_B = calibrated(case)
    expected_BT, scored_BT = padded(case["expected"])
    expected_BT = torch.where(scored_BT, expected_BT, 0.0)
    torch.testing.assert_close(after_BT, expected_BT, rtol=0, atol=1e-6)
    dropped = [
        any(row) and not any(want) for row, want in zip(case["advantages"], case["expected"], strict=True)
    ]
    assert (~kept_B).tolist() == dropped


def _rank_part(rank: int, world: int, folder: str) -> None:
    """One of ``world`` processes: holds every ``world``-th group, calibrates all, keeps its own rows."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    results = []
    for case in CASES:
        mine = [
            i
            for i, group in enumerate(case["group"])
            if sorted(set(case["group"])).index(group) % world == rank
        ]
        part = {key: [case[key][i] for i in mine] for key in ("advantages", "correct", "group")}
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, part)
        gathered = {key: [row for one in parts for row in one[key]] for key in part}
        after_BT, kept_B = calibrated({**case, **gathered})
        start = sum(len(one["group"]) for one in parts[:rank])
        own = slice(start, start + len(mine))
        results.append((mine, after_BT[own], kept_B[own]))
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_calibrate_bit_for_bit_like_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank_part, args=(2, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for number, case in enumerate(CASES):
        after_BT, kept_B = calibrated(case)
        seen = []
        for rank in range(2):
            mine, own_BT, own_kept_B = parts[rank][number]
            assert torch.equal(own_BT, after_BT[mine]), f"case {number}, rank {rank}"
            assert torch.equal(own_kept_B, kept_B[mine]), f"case {number}, rank {rank}"
            seen += mine
        assert sorted(seen) == list(range(len(case["group"])))
