"""Ranks: who am I, and the few collectives the loop needs."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from uniopd_mm.errors import ConfigError, UniOPDError

X = TypeVar("X")


@dataclass(frozen=True)
class World:
    """One process among ``size``; ``local_rank`` counts within its machine."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, items: Iterable[X]) -> list[X]:
        """Everybody's items, in rank order, on every rank."""
        if self.size == 1:
            return list(items)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sum of each value over all ranks; a key that a rank lacks counts as 0 there."""
        total: dict[str, float] = {}
        for part in self.gather([values]):
            for key, value in part.items():
                total[key] = total.get(key, 0.0) + value
        return total

    def any(self, flag: bool) -> bool:
        """True on every rank when it is True on one."""
        return any(self.gather([flag]))

    @contextlib.contextmanager
    def together(self, *kinds: type[Exception]) -> Iterator[None]:
        """An error of these kinds inside, on any rank, ends all ranks, so that none waits for another for ever: it goes on
        where it was raised, and is a UniOPDError with its text elsewhere.

        No other collective may stand inside, where one rank could miss it.
        """
        failure: Exception | None = None
        try:
            yield
        except kinds as error:
            failure = error
        texts = self.gather([] if failure is None else [str(failure) or repr(failure)])
        if failure is not None:
            raise failure
        if texts:
            raise UniOPDError(texts[0])

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def share(self, n: int) -> range:
        """This rank's consecutive part of ``n`` items; parts differ by one item at most."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)


def init_world(timeout_s: float) -> World:
    """Join the process group that the launcher described, or form a group of one without a launcher."""
    import deepspeed

    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    expected = int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    deepspeed.init_distributed(timeout=datetime.timedelta(seconds=timeout_s), verbose=False)
    if (
        dist.get_world_size() != expected
    ):  # some launchers silently start copies that each believe to be alone
        raise ConfigError(
            f"the launcher asked for {expected} processes but {dist.get_world_size()} joined. "
            "Launch with: deepspeed scripts/train_mm.py RECIPE"
        )
    _unlink_shared_memory()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(dist.get_rank(), expected, local_rank, device)


def close_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _unlink_shared_memory() -> None:
    """Take the names off the buffers that DeepSpeed shares among the ranks of a machine without a GPU: it never does,
    and every run would leave 66 MiB of memory per rank behind.  The ranks have them mapped by now."""
    dist.barrier()
    pattern = "deepspeed_allreduce_buffer_{}_{MASTER_ADDR}_{MASTER_PORT}_{RANK}"
    if hasattr(os, "getuid"):
        Path("/dev/shm", pattern.format(os.getuid(), **os.environ)).unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
