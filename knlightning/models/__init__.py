"""Backbones in pure torch."""

from knlightning.models.knresnet import KNResNet, knresnet8, knresnet18, knresnet34, knresnet50
from knlightning.models.norm_torch import load_norm_torch_weights

__all__ = ["KNResNet", "knresnet8", "knresnet18", "knresnet34", "knresnet50", "load_norm_torch_weights"]
