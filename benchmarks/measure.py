"""Clocks shared by both systems: CPU seconds and memory per phase, pictures through the vision tower, model time.

Seconds are those of the process on the CPU, not on the wall: with one thread they are the work itself, also on a machine
that does other things.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

MIB = 2**20
RSS_EVERY_S = 0.01


@dataclass
class Step:
    """What one step took."""

    cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    wall_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By phase; phases may lie within others.  ``step`` is the whole."""
    images: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Pictures that went through a vision tower, by ``student/<innermost phase>`` or ``teacher/...``."""


class Meter:
    """Times phases and watches the resident memory from a thread, from :meth:`start` on."""

    def __init__(self) -> None:
        import psutil

        self.step = Step()
        self.steps: list[Step] = []
        self.peak_rss: dict[str, int] = {}
        """Largest resident memory in bytes seen within each phase (the innermost counts)."""
        self.rss_before = 0
        self._open: list[str] = []
        self._process = psutil.Process()

    def start(self, *models: nn.Module) -> None:
        """Everything is loaded and built: memory is counted from here, but for the weights of ``models``, which are
        mapped from their files and only become resident when they are first read: that is now."""
        for model in models:
            sum(float(p.detach().sum()) for p in model.parameters())
        gc.collect()
        self.rss_before = self._process.memory_info().rss
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def current(self) -> str:
        return self._open[-1] if self._open else "between"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
            self.step.cpu_s[name] += time.process_time() - cpu
            self.step.wall_s[name] += time.perf_counter() - wall

    def end_step(self) -> None:
        """What follows belongs to the next step."""
        self.steps.append(self.step)
        self.step = Step()

    def count_images(self, owner: str, tower: nn.Module) -> None:
        """Count what goes through ``tower`` from now on."""

        def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            pixels = args[0] if args else kwargs["pixel_values"]
            self.step.images[f"{owner}/{self.current}"] += len(pixels)

        tower.register_forward_pre_hook(count, with_kwargs=True)

    def _watch(self) -> None:
        while True:
            rss, phase = self._process.memory_info().rss, self.current
            self.peak_rss[phase] = max(self.peak_rss.get(phase, 0), rss)
            time.sleep(RSS_EVERY_S)

    def summary(self, n_measured: int) -> dict[str, Any]:
        """Medians of ``n_measured`` steps after the first, which is warm-up; memory over all steps so far."""
        measured = self.steps[1 : 1 + n_measured]
        return {
            "cpu_s": _medians([s.cpu_s for s in measured]),
            "wall_s": _medians([s.wall_s for s in measured]),
            "step_cpu_s_each": [s.cpu_s["step"] for s in measured],
            "images": dict(measured[-1].images),
            "rss_before_mib": self.rss_before / MIB,
            "rss_growth_mib": {k: (v - self.rss_before) / MIB for k, v in self.peak_rss.items()},
            "peak_rss_growth_mib": (max(self.peak_rss.values()) - self.rss_before) / MIB,
        }


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row.get(key, 0.0) for row in rows) for key in sorted(set().union(*rows))}


class ModelClock:
    """CPU seconds within the models' modules, our wrapper's forward and recomputed activations included (``forward``),
    from there to each gradient that reaches a weight (``backward``, the loss included), and in the optimizer.

    Costs time itself, so the step that it watches is not one of the measured ones.
    """

    def __init__(self, meter: Meter, models: Mapping[str, nn.Module]) -> None:
        self.meter, self.models = meter, models
        self.cpu_s: dict[str, float] = defaultdict(float)
        """By ``<student or teacher>/forward/<phase>``, ``backward`` and ``optimizer``."""
        self._depth = 0
        self._mark = 0.0
        self._has_graph = False
        """The last forward pass was one with gradient, and no gradient has reached a weight since."""
        self._hooks = ExitStack()

    def __enter__(self) -> ModelClock:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        handles = []
        for owner, model in self.models.items():
            for module in model.modules():
                handles.append(module.register_forward_pre_hook(self._enter_forward))
                handles.append(
                    module.register_forward_hook(self._make_leave_forward(owner), always_call=True)
                )
            for weight in model.parameters():
                if weight.requires_grad:
                    handles.append(weight.register_post_accumulate_grad_hook(self._gradient_arrived))
        handles.append(register_optimizer_step_pre_hook(lambda *_: self._set_mark()))
        handles.append(register_optimizer_step_post_hook(lambda *_: self._add("optimizer")))
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _set_mark(self) -> None:
        self._mark = time.process_time()

    def _add(self, name: str) -> None:
        now = time.process_time()
        self.cpu_s[name] += now - self._mark
        self._mark = now

    def _enter_forward(self, *_: object) -> None:
        if self._depth == 0:
            if self._has_graph and torch.is_grad_enabled():  # part of a backward pass: activations come again
                self._add("backward")
            self._set_mark()
        self._depth += 1

    def _make_leave_forward(self, owner: str) -> Any:
        def leave(*_: object) -> None:
            self._depth -= 1
            if self._depth == 0:
                self._add(f"{owner}/forward/{self.meter.current}")
                self._has_graph = torch.is_grad_enabled()

        return leave

    def _gradient_arrived(self, *_: object) -> None:
        if self._depth == 0:
            self._add("backward")
            self._has_graph = False
