"""Differentially private training."""

from knlightning.privacy.callback import DifferentialPrivacy

__all__ = ["DifferentialPrivacy"]
