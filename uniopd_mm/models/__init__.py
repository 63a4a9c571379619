"""LLaVA-style wrappers: vision tower -> projector -> language model, the same three stages for every family."""

from uniopd_mm.models.loading import load_model, load_processor, load_student, load_weights
from uniopd_mm.models.logprobs import token_logprobs
from uniopd_mm.models.scoring import pad_responses, response_logprobs, split_groups
from uniopd_mm.models.stages import stage_of, stage_parameters
from uniopd_mm.models.wrapper import MultimodalLM, Prefix

__all__ = [
    "MultimodalLM",
    "Prefix",
    "load_model",
    "load_processor",
    "load_student",
    "load_weights",
    "pad_responses",
    "response_logprobs",
    "split_groups",
    "stage_of",
    "stage_parameters",
    "token_logprobs",
]
