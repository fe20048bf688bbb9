"""Small private runs, and the same by a loop over single samples."""

import copy

import standins
import torch
from torch import nn
from torch.nn import functional as F

from knlightning.nn import KNConv2d
from knlightning.privacy import DifferentialPrivacy
from knlightning.privacy.clipping import MARGIN
from knlightning.privacy.randomness import SecretRandom, known_key
from knlightning.tasks import ClassificationTask

CPU = torch.device("cpu")
SAMPLES = 20


class Net(nn.Sequential):
    """Small, without randomness of its own."""

    def __init__(self, norm=None):
        super().__init__(
            KNConv2d(3, 4, 3, 2, 1, dropout_p=0.0),
            *([norm] if norm else []),
            nn.Mish(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )


def task(net=None, lr=0.5, kind=ClassificationTask, **kwargs):
    torch.manual_seed(0)
    return kind(net or Net(), optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9), **kwargs)


def trainer(tmp_path, *callbacks, **kwargs):
    return standins.trainer(tmp_path, *callbacks, **({"max_epochs": 3, "limit_val_batches": 0} | kwargs))


def privacy(**kwargs):
    settings = {"noise_multiplier": 0.8, "target_delta": 1e-3, "max_grad_norm": 0.7, "accountant": "rdp", "seed": 5}
    return DifferentialPrivacy(**(settings | kwargs))


def naive(module, data, batch, steps, bound=0.7, noise=0.8, loss=None, leave_out=None):
    """DP-SGD as it is written down, one sample at a time."""
    loss = loss or (lambda net, image, label: F.cross_entropy(net(image), label))
    net = copy.deepcopy(module.backbone)
    optimizer = module.make_optimizer(net.parameters())
    random = SecretRandom(known_key(5))
    count = sum(p.numel() for p in net.parameters())
    for step in range(steps):
        total = torch.zeros(count)
        for i in random.chosen(len(data), batch / len(data), step).tolist():
            if i == leave_out:
                continue
            image, label = data[i]
            gradient = torch.autograd.grad(loss(net, image[None], label[None]), list(net.parameters()))
            flat = torch.cat([g.flatten() for g in gradient])
            total += flat * min(1.0, bound * (1 - MARGIN) / max(flat.norm().item(), 1e-12))
        total += noise * bound * random.normal(count, "noise", step, CPU)
        for p, g in zip(net.parameters(), total.split([p.numel() for p in net.parameters()]), strict=True):
            p.grad = g.view_as(p) / batch
        optimizer.step()
    return net.state_dict()
