"""Training with differential privacy: gradients of single samples."""

from knlightning.privacy.grad_sample import watch_statistics
from knlightning.privacy.per_sample import PerSampleGradients
from knlightning.privacy.rules import check_rules

__all__ = ["PerSampleGradients", "check_rules", "watch_statistics"]
