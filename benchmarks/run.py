"""Our training step against TRL's, on the same small models, with one CPU thread; prints tables with ratios.

    python benchmarks/run.py                              all four cases, both systems in turn (about 15 minutes)
    python benchmarks/run.py --cases small,image          two of them (about 5 minutes)
    python benchmarks/run.py --only ours --cases image    without the peer
    python benchmarks/run.py --scaling                    also: a step's time against the rollouts per prompt
    python benchmarks/run.py --floor                      also: how far from the bare matrix products
    python benchmarks/run.py --profile image              where our step's time goes, and nothing else
    python benchmarks/run.py --show                       the tables of the last run

Models and prompts are built once, in --work.  The peer is TRL's DistillationTrainer: pip install trl==1.16.0; without it
only ours runs.  README.md says what is measured and what cannot be compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import CASES
from command import add_shared_arguments
from tables import render

HERE = Path(__file__).resolve().parent
SCRIPTS = {"peer": "peer_trl.py", "ours": "ours.py"}
PEER_VERSION = "1.16.0"
SCALING_CASE, SCALING_N = "image", (1, 2, 4, 8, 16)


def main() -> int:
    args = parse_args()
    if args.profile:
        command = [sys.executable, HERE / "ours.py", args.profile, "--profile", "--work", args.work]
        return subprocess.run(command, check=False).returncode
    if args.show:
        print(render(json.loads(args.out.read_text(encoding="utf-8"))))
        return 0
    systems = [args.only] if args.only else list(SCRIPTS)
    if "peer" in systems and not has_peer():
        systems.remove("peer")
        if not systems:
            return 1
    results: dict[str, Any] = {"versions": versions(), "freeze": args.freeze, "cases": {}}
    for name in args.cases:
        results["cases"][name] = run_case(name, systems, args)
        save(results, args.out)
    if args.scaling:
        results["scaling"] = run_scaling(systems, args)
        save(results, args.out)
    print("\n" + render(results))
    return 0


def run_case(name: str, systems: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Each system ``--repeat`` times, in turn."""
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    options = ["--flops"] if args.flops else []
    for _ in range(args.repeat):
        for system in systems:
            runs[system].append(run_system(system, name, options, args))
    result: dict[str, Any] = {"case": asdict(CASES[name])}
    result |= {system: middle(found) for system, found in runs.items()}
    if args.floor and "ours" in runs:  # ours alone knows the prompts' length
        from floor import floor_seconds, needed_work

        work = needed_work(CASES[name], round(result["ours"]["prompt_tokens"]))
        result["floor"] = floor_seconds(work)
    return result


def run_scaling(systems: list[str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """CPU seconds of a step with one prompt, by rollouts per prompt."""
    seconds: dict[str, dict[str, float]] = {}
    for n in SCALING_N:
        options = ["--n", str(n), "--prompts", "1"]
        runs = {system: run_system(system, SCALING_CASE, options, args) for system in systems}
        seconds[str(n)] = {system: run["cpu_s"]["step"] for system, run in runs.items()}
    return seconds


def run_system(system: str, case: str, options: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """One process of one system; its measurements."""
    label = " ".join([case, *options])
    print(f"{label:28} {system:5} ", end="", flush=True)
    measured, log = args.work / "last.json", args.work / "last.log"
    measured.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / SCRIPTS[system]), case, *options]
    command += ["--steps", str(args.steps), "--work", str(args.work), "--json", str(measured)]
    command += ["--freeze", *args.freeze] if args.freeze else []
    began = time.monotonic()
    with log.open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"failed with exit status {code}; all of its output is in {log}:\n{tail}")
    result = json.loads(measured.read_text(encoding="utf-8"))
    print(
        f"{result['cpu_s']['step']:7.2f} CPU s a step, memory +{result['peak_rss_growth_mib']:.0f} MiB "
        f"({time.monotonic() - began:.0f} s in all)"
    )
    return result


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Number by number the median of equal runs; all steps' times are kept."""
    merged = _middle(runs)
    merged["step_cpu_s_each"] = [seconds for run in runs for seconds in run["step_cpu_s_each"]]
    merged["cpu_s"]["step"] = statistics.median(merged["step_cpu_s_each"])
    return merged


def _middle(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: _middle([v[key] for v in values if key in v]) for key in values[0]}
    return statistics.median(values) if isinstance(values[0], int | float) else values[0]


def has_peer() -> bool:
    """Whether the peer is installed; says what to do if it is not the version meant."""
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        print(f"TRL is not installed (pip install trl=={PEER_VERSION}): only our own step is measured.")
        return False
    if found != PEER_VERSION:
        print(
            f"TRL {found} is installed; peer_trl.py is written for {PEER_VERSION} (pip install trl=={PEER_VERSION})."
        )
    return True


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "deepspeed", "trl"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shared_arguments(parser)
    parser.add_argument(
        "--cases", type=parse_cases, default=list(CASES), help=f"of {','.join(CASES)} (default: all)"
    )
    parser.add_argument("--repeat", type=int, default=1, help="runs of each system, in turn (default: 1)")
    parser.add_argument("--only", choices=SCRIPTS, help="run one system")
    parser.add_argument("--scaling", action="store_true", help="1 to 16 rollouts of one prompt")
    parser.add_argument("--floor", action="store_true", help="time the needed matrix products by themselves")
    parser.add_argument("--profile", choices=CASES, metavar="CASE", help="print our step's operators by time")
    parser.add_argument("--show", action="store_true", help="print the tables of --out, run nothing")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results.json", help="measurements (default: beside this file)"
    )
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be 2 or more: the first step is a warm-up")
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def parse_cases(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
