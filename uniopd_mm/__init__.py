"""uniopd_mm: multimodal on-policy distillation with outcome-calibrated token advantages (Uni-OPD, arXiv 2605.03677)."""

__version__ = "0.1.0"
