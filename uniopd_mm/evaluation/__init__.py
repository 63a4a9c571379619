"""What ``eval/run.py`` and evaluation during training share; the names here are those that training needs."""

from uniopd_mm.evaluation.runner import evaluate, summarise, write_scored

__all__ = ["evaluate", "summarise", "write_scored"]
