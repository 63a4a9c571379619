"""Measurements as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Row = Sequence[str]
SYSTEMS = ("peer", "ours")


def render(results: dict[str, Any]) -> str:
    """Every table that the measurements allow."""
    cases = results["cases"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    frozen = ", ".join(results["freeze"]) or "nothing"
    parts = [f"{versions}; frozen: {frozen}", headline(cases), split(cases), inside_models(cases)]
    parts += [scaling(results["scaling"])] if "scaling" in results else []
    parts += [floor(cases)] if any("floor" in case for case in cases.values()) else []
    return "\n\n".join(part for part in parts if part)


def headline(cases: dict[str, Any]) -> str:
    """Step time and memory against their targets."""
    header = ["case", "peer step, CPU s", "ours", "ratio", "target"]
    header += ["peer peak memory, MiB", "ours", "ratio", "target"]
    rows = []
    for name, result in cases.items():
        peer, ours, case = result.get("peer"), result.get("ours"), result["case"]
        row = [name]
        for value, digits, target in (
            (lambda r: r["cpu_s"]["step"], 2, case["step_target"]),
            (lambda r: r["peak_rss_growth_mib"], 0, case["memory_target"]),
        ):
            row += [f"{value(r):.{digits}f}" if r else "-" for r in (peer, ours)]
            row += judged(value(ours) / value(peer) if peer and ours else None, target)
        rows.append(row)
    return table(header, rows)


def judged(ratio: float | None, target: float) -> list[str]:
    """A ratio and its target, as fractions of one."""
    wanted = f"1/{1 / target:g}"
    if ratio is None:
        return ["-", wanted]
    return [f"1/{1 / ratio:.2f}", f"{wanted} {'met' if ratio <= target else 'missed'}"]


def split(cases: dict[str, Any]) -> str:
    """CPU seconds by phase, tokens per CPU second, passes of a picture through a vision tower."""
    phases = ("encode", "sample", "score", "update")
    header = ["case", "system", *(f"{p}, s" for p in phases), "step, s (range)"]
    header += [f"tokens/s {p}" for p in (*phases[1:], "step")] + ["passes per picture: sample, score, update"]
    rows = []
    for name, system, result, case in _measured(cases):
        seconds, each, images = result["cpu_s"], result["step_cpu_s_each"], result["images"]
        tokens = case["prompts"] * case["n"] * case["response"]
        passes = [
            images.get(k, 0) / case["prompts"] for k in ("student/sample", "teacher/score", "student/update")
        ]
        rows.append(
            [
                name,
                system,
                *(f"{seconds[p]:.2f}" for p in phases),
                f"{seconds['step']:.2f} ({min(each):.2f}-{max(each):.2f})",
                *(f"{tokens / seconds[p]:.0f}" for p in (*phases[1:], "step")),
                ", ".join(f"{n:g}" for n in passes),
            ]
        )
    return table(header, rows)


def inside_models(cases: dict[str, Any]) -> str:
    """Of our step: CPU seconds within the models' modules, backward passes and the optimizer, and the rest."""
    names = {
        "student/forward/sample": "sampling forward",
        "teacher/forward/score": "teacher forward",
        "student/forward/update": "update forward",
        "backward": "backward",
        "optimizer": "optimizer",
    }
    rows = []
    for name, system, result, _ in _measured(cases):
        if system == "ours":
            inside, step = result["model_cpu_s"], result["clocked_step_cpu_s"]
            known = [inside.get(key, 0.0) for key in names]
            rest = step - sum(known)
            rows.append([name, *(f"{s:.2f}" for s in known), f"{rest:.2f}", f"{1 - rest / step:.0%}"])
    if not rows:
        return ""
    return table(["our step, clocked", *names.values(), "everything else, s", "in the models"], rows)


def scaling(seconds: dict[str, dict[str, float]]) -> str:
    """Step time by group size, one prompt."""
    systems = [s for s in SYSTEMS if all(s in row for row in seconds.values())]
    header = ["rollouts of one prompt", *(f"{s} step, CPU s" for s in systems)]
    header += [f"{s}, s per rollout" for s in systems]
    rows = [
        [n, *(f"{row[s]:.2f}" for s in systems), *(f"{row[s] / int(n):.3f}" for s in systems)]
        for n, row in seconds.items()
    ]
    return table(header, rows)


def floor(cases: dict[str, Any]) -> str:
    """Operations done against those needed, and the time the needed ones take by themselves."""
    header = ["case", "GFLOP needed", "done by ours", "by the peer", "large product, GFLOP/s"]
    header += ["floor at that rate, s", "floor in own shapes, s", "ours / floor", "peer / floor"]
    rows = []
    for name, result in cases.items():
        if "floor" in result:
            bound = result["floor"]
            found = [result.get(system) for system in ("ours", "peer")]
            rows.append(
                [
                    name,
                    f"{bound['needed_gflop']:.0f}",
                    *(f"{r['flops'] / 1e9:.0f}" if r and "flops" in r else "-" for r in found),
                    f"{bound['large_product_gflops']:.0f}",
                    f"{bound['large_product_s']:.2f}",
                    f"{bound['own_shapes_s']:.2f}",
                    *(f"{r['cpu_s']['step'] / bound['own_shapes_s']:.2f}" if r else "-" for r in found),
                ]
            )
    return table(header, rows)


def table(header: Row, rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measured(cases: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(case, system, measurements, sizes) of all that was run."""
    for name, result in cases.items():
        for system in SYSTEMS:
            if system in result:
                yield name, system, result[system], result["case"]
