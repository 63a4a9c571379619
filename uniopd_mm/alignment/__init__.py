"""Whose token is scored where: what a teacher sees of a prompt, how its scores come back to the student.

Pure: functions over messages, tokenizers' facts, lists and tensors; no teacher, no model, no process group.
"""

from uniopd_mm.alignment.spans import Span
from uniopd_mm.alignment.tokens import (
    AlignedResponse,
    Aligner,
    Vocabulary,
    difference,
    same_vocabulary,
    text_encoder,
    vocabulary,
)
from uniopd_mm.alignment.views import teacher_messages

__all__ = [
    "AlignedResponse",
    "Aligner",
    "Span",
    "Vocabulary",
    "difference",
    "same_vocabulary",
    "teacher_messages",
    "text_encoder",
    "vocabulary",
]
