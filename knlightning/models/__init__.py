"""Backbones in pure torch."""

from knlightning.models.conversion import converted
from knlightning.models.convnext import convnext_tiny, knconvnext_tiny
from knlightning.models.densenet import DenseNet, densenet121
from knlightning.models.fcn import (
    FCN,
    fcn_knresnet8,
    fcn_knresnet18,
    fcn_knresnet34,
    fcn_knresnet50,
    fcn_resnet8,
    fcn_resnet18,
    fcn_resnet34,
    fcn_resnet50,
)
from knlightning.models.fine_tuned import fine_tuned
from knlightning.models.hub import HubModel
from knlightning.models.kernel_normalize import is_batch_independent, kernel_normalize
from knlightning.models.knresnet import (
    KNResNet,
    knresnet8,
    knresnet13,
    knresnet18,
    knresnet34,
    knresnet50,
    knresnet101,
    knresnet152,
)
from knlightning.models.lora import LoRA, add_lora
from knlightning.models.norm_torch import KNResNet18_Weights, KNResNet34_Weights, KNResNet50_Weights
from knlightning.models.preact_resnet import preact_resnet18, preact_resnet34, preact_resnet50
from knlightning.models.registry import Model, list_models
from knlightning.models.resnet import resnet8, resnet13, resnet18, resnet34, resnet50, resnet101, resnet152
from knlightning.models.vgg import vgg11, vgg16
from knlightning.models.weights import LoadedWeights, load_weights

__all__ = [
    "FCN",
    "DenseNet",
    "HubModel",
    "KNResNet",
    "KNResNet18_Weights",
    "KNResNet34_Weights",
    "KNResNet50_Weights",
    "LoRA",
    "LoadedWeights",
    "Model",
    "add_lora",
    "converted",
    "convnext_tiny",
    "densenet121",
    "fcn_knresnet8",
    "fcn_knresnet18",
    "fcn_knresnet34",
    "fcn_knresnet50",
    "fcn_resnet8",
    "fcn_resnet18",
    "fcn_resnet34",
    "fcn_resnet50",
    "fine_tuned",
    "is_batch_independent",
    "kernel_normalize",
    "knconvnext_tiny",
    "knresnet8",
    "knresnet13",
    "knresnet18",
    "knresnet34",
    "knresnet50",
    "knresnet101",
    "knresnet152",
    "list_models",
    "load_weights",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "resnet8",
    "resnet13",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "vgg11",
    "vgg16",
]
