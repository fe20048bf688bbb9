"""What holds for every backbone of classification with every normalization."""

from typing import get_args

import pytest
import torch

from knlightning import models
from knlightning.nn import Norm

# not the class KNResNet
NAMES = [name for name in models.__all__ if "resnet" in name and not name.startswith("fcn")]
# 32 groups divide neither 16 nor 724, 843 or 810 channels, 2 groups neither 843 nor 201
INDIVISIBLE = {(f"knresnet{depth}", "group") for depth in (8, 18, 34, 50)}
INDIVISIBLE |= {(f"knresnet{depth}", "local_context") for depth in (34, 50)}


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("name", NAMES)
def test_trains_and_evaluates(name: str, norm: Norm) -> None:
    if (name, norm) in INDIVISIBLE:
        with pytest.raises(ValueError, match=r"\d+ channels"):
            getattr(models, name)(7, low_resolution=True, norm=norm)
        return
    torch.manual_seed(0)
    model = getattr(models, name)(7, low_resolution=True, norm=norm)
    # torch normalizes instances of more than one pixel only, which is what small images come down to
    x = torch.rand(2, 3, *((33, 34) if norm == "instance" else (17, 18)))
    logits = model(x)
    assert logits.shape == (2, 7)
    logits.logsumexp(1).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_large_images_and_the_other_activations(name: str) -> None:
    model = getattr(models, name)(5, norm="layer", low_resolution=False, activation="silu").eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 97, 130)).shape == (1, 5)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "SiLU" in kinds
    assert "ReLU" not in kinds
    assert kinds & {"BatchNorm2d", "KNConv2d", "KernelNorm2d"} == set()


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments(name: str) -> None:
    make = getattr(models, name)
    with pytest.raises(ValueError, match=r"norm must be one of batch, .*, none, got 'layers'"):
        make(norm="layers")
    with pytest.raises(ValueError, match="activation must be one of relu, mish, gelu, silu, got 'tanh'"):
        make(activation="tanh")
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        make(0)
    with pytest.raises(ValueError, match="dropout_p"):
        make(norm="kernel", dropout_p=1.0)
