"""A training run without the rollouts that a file names: what a run with failing teachers has to be equal to.

python left_out.py RECIPE LEFT_OUT.json [key=value ...]        {"1": [["row4", 0], ...]}: prompt and sample of each step
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from uniopd_mm.config import TrainConfig  # noqa: E402
from uniopd_mm.settings import load_config  # noqa: E402
from uniopd_mm.training.launch import StopRequest, prepare_environment  # noqa: E402


def main(recipe: str, names: str, *overrides: str) -> int:
    prepare_environment()
    from uniopd_mm.engines import LocalEngine
    from uniopd_mm.training.run import Run

    left_out = {
        int(step): {tuple(one) for one in rows} for step, rows in json.loads(Path(names).read_text()).items()
    }

    class LeavingOut(LocalEngine):
        def sample(self, groups, n, sampling, seed, progress=None, finished=None):
            sampled = super().sample(groups, n, sampling, seed, progress)
            if n != run.config.rollout.n:  # checks and evaluation
                return sampled
            gone = left_out.get(seed[1] + 1, set())
            return [
                replace(
                    g, rollouts=tuple(r for i, r in enumerate(g.rollouts) if (g.prompt.id, i) not in gone)
                )
                for g in sampled
            ]

    spec = importlib.util.spec_from_file_location("train_mm", ROOT / "scripts" / "train_mm.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with Run(load_config(TrainConfig, recipe, overrides), StopRequest()) as run:
        run.engine = LeavingOut(run.student, run.config.rollout.concurrent_rollouts)
        script.train(run)
        return run.finish()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
