"""Checks on real prompts before anything is trained: what a run would otherwise get wrong in silence.

``python scripts/check.py RECIPE`` and ``scripts/train_mm.py RECIPE --check`` make all of them, every run the cheap ones
at its start.
"""

from uniopd_mm.preflight.checks import (
    check_context,
    check_coverage,
    check_head,
    check_sampler,
    check_servers,
    check_teacher_context,
    check_temperature,
    check_truncation,
    check_views,
    check_vocabularies,
    score_student,
    served_groups,
)
from uniopd_mm.preflight.findings import Finding, PreflightError, Topic, require_ok
from uniopd_mm.preflight.grounding import Audit, audit, gold_groups, judge
from uniopd_mm.preflight.null import null_test
from uniopd_mm.preflight.tables import TokenTable, token_table
from uniopd_mm.preflight.templates import compare_templates

__all__ = [
    "Audit",
    "Finding",
    "PreflightError",
    "TokenTable",
    "Topic",
    "audit",
    "check_context",
    "check_coverage",
    "check_head",
    "check_sampler",
    "check_servers",
    "check_teacher_context",
    "check_temperature",
    "check_truncation",
    "check_views",
    "check_vocabularies",
    "compare_templates",
    "gold_groups",
    "judge",
    "null_test",
    "require_ok",
    "score_student",
    "served_groups",
    "token_table",
]
