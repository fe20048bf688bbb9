"""Differentially private training: the callback, and gradients of single samples."""

from knlightning.privacy.callback import DifferentialPrivacy
from knlightning.privacy.grad_sample import register_opacus_rules, watch_statistics
from knlightning.privacy.per_sample import PerSampleGradients
from knlightning.privacy.rules import check_rules

__all__ = ["DifferentialPrivacy", "PerSampleGradients", "check_rules", "register_opacus_rules", "watch_statistics"]
