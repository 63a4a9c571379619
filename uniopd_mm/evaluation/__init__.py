"""The runner that ``eval/run.py`` and evaluation during training share."""

from uniopd_mm.evaluation.runner import Sample, evaluate, summarise, write_samples

__all__ = ["Sample", "evaluate", "summarise", "write_samples"]
