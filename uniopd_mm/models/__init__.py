"""LLaVA-style wrappers: vision tower -> projector -> language model, the same three stages for every family."""

from uniopd_mm.models.decoding import start_decoding
from uniopd_mm.models.loading import build_student, context_length, load_model, load_processor, load_student
from uniopd_mm.models.logprobs import token_logprobs
from uniopd_mm.models.scoring import (
    group_logprobs,
    pad_responses,
    plan_chunks,
    response_logprobs,
    split_groups,
)
from uniopd_mm.models.stages import stage_of, stage_parameters
from uniopd_mm.models.wrapper import MultimodalLM

__all__ = [
    "MultimodalLM",
    "build_student",
    "context_length",
    "group_logprobs",
    "load_model",
    "load_processor",
    "load_student",
    "pad_responses",
    "plan_chunks",
    "response_logprobs",
    "split_groups",
    "stage_of",
    "stage_parameters",
    "start_decoding",
    "token_logprobs",
]
