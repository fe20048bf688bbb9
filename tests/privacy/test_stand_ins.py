from functools import partial

import pytest
import timm
import torch
from privacy.micro_batches import check
from privacy.private_runs import SAMPLES, naive, privacy, task, trainer
from standins import RandomData
from timm.models import maxxvit
from timm.models.mobilevit import MobileVitBlock
from torch import nn
from torch.nn import functional as F
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlock, CNBlockConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.ops import Permute

from knlightning.models import kernel_normalize
from knlightning.nn import StandardizedKNConv2d
from knlightning.privacy import PerSampleGradients

vit = partial(VisionTransformer, 8, 4, 2, 2, 8, 16, num_classes=3)
convnext = partial(ConvNeXt, [CNBlockConfig(4, 8, 1), CNBlockConfig(8, None, 1)], layer_scale=1.0, num_classes=3)
swin = partial(SwinTransformer, [2, 2], 8, [2, 2], [2, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=3)
few = {"img_size": 32, "num_classes": 3, "depth": 1, "embed_dim": 12, "num_heads": 3}
windows = {**few, "window_size": 4, "embed_dim": 8, "depth": (2, 1), "num_heads": (2, 2), "drop_path_rate": 0.0}
windows["depths"] = windows.pop("depth")


def maxvit(kind):
    settings = maxxvit.MaxxVitTransformerCfg(dim_head=4, window_size=(2, 2))
    attention = getattr(maxxvit, kind)(8, cfg=settings)
    return nn.Sequential(nn.Conv2d(3, 8, 1), Permute([0, 2, 3, 1]), attention)


def coatnet():
    positions = partial(timm.layers.RelPosBias, (4, 4))
    return maxxvit.TransformerBlock2d(3, 3, 1, positions, maxxvit.MaxxVitTransformerCfg(dim_head=1))


def mobilevit():
    block = MobileVitBlock(3, transformer_dim=8, transformer_depth=1, num_heads=2, patch_size=2)
    return kernel_normalize(block, 0.0)[0]


def xcit():
    small = {**few, "embed_dim": 16, "num_heads": 2}
    return kernel_normalize(timm.create_model("xcit_nano_12_p16_224", **small), 0.0)[0]


QUICK = {
    "MaxViT": (partial(maxvit, "PartitionAttentionCl"), 4),
    "MaxViT, in parallel": (partial(maxvit, "ParallelPartitionAttention"), 4),
    "CoAtNet": (coatnet, 4),
    "MobileViT": (mobilevit, 4),
    "ViT of torchvision": (vit, 8),
    "Swin V2 of torchvision": (partial(swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 16),
    "swin_tiny_patch4_window7_224": (windows, 32),
}
SLOW = {
    "XCiT": (xcit, 32),
    "Swin of torchvision": (swin, 16),
    "ConvNeXt of torchvision": (convnext, 32),
    "vit_tiny_patch16_224": (few, 32),
    "vit_small_patch14_reg4_dinov2": ({**few, "img_size": 28, "init_values": 0.5}, 28),
    "deit_tiny_distilled_patch16_224": (few, 32),
    "vit_base_patch16_siglip_224": (few, 32),
    "beit_base_patch16_224": (few, 32),
    "eva02_tiny_patch14_224": ({**few, "embed_dim": 24, "num_heads": 2, "img_size": 28}, 28),
    "cait_xxs24_224": (few, 32),
    "swinv2_tiny_window8_256": (windows, 32),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 8), "num_classes": 3, "ls_init_value": 0.5}, 32),
    "convnextv2_atto": ({"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 8), "num_classes": 3}, 32),
    "nf_resnet26": ({"num_classes": 3, "width_factor": 0.25}, 32),
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_networks_of_other_packages_equal_micro_batches(name):
    make, size = (QUICK | SLOW)[name]
    torch.manual_seed(0)
    net = (timm.create_model(name, **make) if isinstance(make, dict) else make()).double()
    for parameter in net.parameters():  # many start at zero
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    check(net, x, rtol=1e-7, views=2)
    check(net, x[:1], rtol=1e-7)
    assert not any(vars(module).keys() & dict(module.named_parameters(recurse=False)) for module in net.modules())


@pytest.mark.parametrize("make", [vit, partial(convnext, stochastic_depth_prob=0.0)], ids=["ViT", "ConvNeXt"])
def test_networks_train_privately(make, tmp_path):
    """As a loop over single samples does, with micro-batches of which some are empty."""
    torch.manual_seed(0)
    module, data = task(make(), lr=0.1), RandomData(SAMPLES, 5)
    expected = naive(module, data.dataset, 5, 4)
    trainer(tmp_path, privacy(physical_batch_size=2), max_epochs=1).fit(module, data)
    torch.testing.assert_close(dict(module.backbone.state_dict()), expected, rtol=1e-3, atol=2e-4)


def standardized(kernel_size, dtype=torch.float32):
    layers = [nn.Conv2d(3, 8, 1), StandardizedKNConv2d(8, 64, kernel_size, dropout_p=0.3), nn.Flatten()]
    return nn.Sequential(*layers).to(dtype=dtype, memory_format=torch.channels_last)


RANDOM = {
    "ViT": partial(vit, dropout=0.3),
    "KNConv": partial(standardized, 3),
    "KNConv of pixels": partial(standardized, 1),
    "KNConv without compiled passes": partial(standardized, 3, torch.float64),
}


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_what_is_drawn_is_what_the_network_draws_alone(make):
    """Private runs compare the sum of the gradients of samples with the gradient of the batch."""
    torch.manual_seed(0)
    net = make()
    x = torch.rand(4, 3, 8, 8, dtype=next(net.parameters()).dtype).contiguous(memory_format=torch.channels_last)
    gradients = PerSampleGradients(net, "sum")
    torch.manual_seed(1)
    net(x).sin().sum().backward()
    gradients.attach()
    torch.manual_seed(1)
    net(x).sin().sum().backward()
    gradients.norms()
    gradients.accumulate(torch.ones(4))
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.summed_grad, parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_a_sample_whose_block_is_skipped_has_no_gradient():
    """The masks of stochastic depth are those of the forward pass."""
    block, x = CNBlock(4, 0.3, 0.5).double(), torch.randn(6, 4, 5, 5, dtype=torch.float64)
    torch.manual_seed(1)
    block(x).square().sum().backward()
    gradients = PerSampleGradients(block, "sum")
    gradients.attach()
    torch.manual_seed(1)
    block(x).square().sum().backward()
    assert 0 < (gradients.norms() == 0).sum() < 6
    gradients.accumulate(torch.ones(6))
    for parameter in block.parameters():
        torch.testing.assert_close(parameter.summed_grad, parameter.grad)


class Bare(nn.Module):
    """Uses a parameter in some way."""

    def __init__(self, shape, use):
        super().__init__()
        self.first, self.bare, self.use = nn.Linear(3, 3), nn.Parameter(torch.rand(shape)), use

    def forward(self, x):
        return self.use(self.first(x), self.bare)


ALLOWED = {
    "a product with a scalar": ((), lambda x, p: p * x),
    "a difference, in place": ((3,), lambda x, p: x.clone().sub_(p.exp())),
    "a token before the others": ((1, 1, 3), lambda x, p: torch.cat([p.expand(len(x), 1, 3), x[:, None]], 1)),
    "a token of fewer dimensions": ((3,), lambda x, p: torch.stack([p.expand_as(x), x], 1)),
    "a repeated token": ((1, 2), lambda x, p: torch.cat([p.repeat(len(x), 1), x], 1)),
    "a choice": ((3,), lambda x, p: torch.where(x > 0.3, x, p)),
    "a product of matrices": ((3, 2), lambda x, p: x @ p),
    "a table": ((7,), lambda x, p: x + p[torch.tensor([2, 0, 2])]),
    "without a gradient": ((3,), lambda x, p: x * p.detach() + p),
    "several times": ((3,), lambda x, p: F.linear(x * p, torch.stack([p, p.sin()]), p[:2])),
}


@pytest.mark.parametrize("way", ALLOWED)
def test_ways_to_use_a_parameter(way):
    torch.manual_seed(0)
    check(Bare(*ALLOWED[way]).double(), torch.randn(4, 3).double())


REFUSED = {
    "bare meets samples in the function pow": ((3,), lambda x, p: x**p),
    "bare meets samples in the function cat": ((4, 3), lambda x, p: torch.cat([x, p])),
    r"bare of the shape \(4, 3\) meets samples": ((4, 3), lambda x, p: x + p),
    "bare meets samples in the function matmul": ((4, 4), lambda x, p: p @ x),
    "must be the second factor, and have two dimensions": ((4, 3, 2), lambda x, p: x @ p),
    "bare meets samples in the function linear": ((4, 3), lambda x, p: nn.Linear(3, 3)(p)),
    "got no samples, but parameters alone": ((4, 3), lambda x, p: p.sin()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_rule_is_refused(message):
    net = Bare(*REFUSED[message])
    PerSampleGradients(net).attach()
    with pytest.raises((TypeError, ValueError), match=message):
        net(torch.randn(4, 3)).sum().backward()
    assert type(net.bare) is nn.Parameter  # nothing stands in for it any more
