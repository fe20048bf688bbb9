"""What has broken the guarantee, case by case: refused when the run starts, or harmless by construction.

And with that protection taken away the audit fails, so that it does not depend on it.
"""

from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from privacy.private_runs import SAMPLES, Net, privacy, task, trainer
from privacy.test_batch_hooks import MixingCollate, mixing_hook, standardized
from privacy.test_private_step import Outside
from privacy.test_probe import HomeMadeBatchNorm
from standins import RandomData
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import DropBlock2d

from knlightning.nn import KNConv2d
from knlightning.privacy import batch_hooks, loader
from knlightning.privacy.audit import PrivacyAudit
from knlightning.privacy.per_sample import PerSampleGradients
from knlightning.privacy.product import Product
from knlightning.privacy.randomness import SecretRandom
from knlightning.tasks import ClassificationTask

BOUND, OTHERS = "a sample changes a step by no more than the bound", "a sample changes no other sample"
MASKS = "masks and augmentation are secret"
STORED, NOISE = "a step stores nothing of its samples", "noise is random to the last bit"


class Weighted(ClassificationTask):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([1.0, 0.01, 0.01]))


class Ignoring(ClassificationTask):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=0)


class Seldom(ClassificationTask):
    def training_step(self, batch, batch_idx):
        images = standardized(batch)[0] if torch.rand(()) < 0.3 else batch[0]
        return F.cross_entropy(self(images), batch[1])


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.count += len(x)
        return x


def float32_noise(self, count, purpose, step, device):
    return torch.randn(count, generator=torch.Generator().manual_seed(step % 1000)).double()


class Twice(nn.Module):
    """A block that two reentrant checkpoints share."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Linear(192, 192), nn.Linear(192, 3)
        nn.init.zeros_(self.block.weight)  # so that both passes are alike

    def forward(self, x):
        x = x.flatten(1).requires_grad_()
        for _ in range(2):
            x = x + 3.0 * checkpoint(self.block, x, use_reentrant=True)
        return self.head(x)


def wide_net():
    """A layer with more weights than there are values at its input and output."""
    return nn.Sequential(KNConv2d(3, 64, 4, 4, dropout_p=0.0), nn.Mish(), nn.Flatten(), nn.Linear(256, 3))


def zero_head():
    module = task(kind=Weighted)
    nn.init.zeros_(module.backbone[-1].weight)
    return module


def outside():
    module = task(kind=Outside)
    module.kept = [nn.Parameter(torch.ones(3))]
    return module


def images(change=None):
    """SAMPLES random images, all in one step; all but one are of the same class, and the data may be changed."""
    data = RandomData(SAMPLES, SAMPLES)
    data.dataset.tensors[1].copy_(torch.arange(SAMPLES) > 0)
    if change:
        change(data.dataset.tensors[0])
    return data


def outlier(pixels):
    pixels[0] = 40.0


def mixing(kind):
    """One image differs from all others, and what reads or transfers a batch standardizes all by all."""
    return lambda: type("Standardizing", (kind,), {"mix": staticmethod(standardized)})(other=True)


class Case(NamedTuple):
    """What a user may do.

    Attributes:
        module: Makes the task.
        data: Makes the data.
        refused: Why the run does not start; None if nothing is wrong with it, by construction.
        unprotected: Attributes of classes and modules in place of those that protect, and arguments of the callback.
        found: What the audit finds then.
        callback: Another callback of the run.
    """

    module: object
    data: object = images
    refused: str | None = None
    unprotected: tuple = ()
    found: str | None = OTHERS
    callback: object = None


MIXES = "does not treat each sample by itself"
WHOLE_BATCHES = ("is_batch_independent", lambda *args: True)
CASES = {
    "1 a hook mixes": Case(
        task, mixing(mixing_hook("on_after_batch_transfer")), None, ((batch_hooks, *WHOLE_BATCHES),)
    ),
    "1 collation mixes": Case(task, mixing(MixingCollate), None, ((loader, *WHOLE_BATCHES),)),
    "2 a layer mixes": Case(lambda: task(Net(HomeMadeBatchNorm())), images, MIXES),
    "2 classes have weights": Case(lambda: task(kind=Weighted), images, MIXES),
    "2 a label is ignored": Case(lambda: task(kind=Ignoring), images, MIXES),
    "3 the head starts at zero": Case(zero_head, images, MIXES),
    "4 samples mix by chance": Case(lambda: task(kind=Seldom), lambda: images(outlier), MIXES),
    "5 a parameter nobody watches": Case(
        outside, images, r"a parameter of the shape \(3,\) that is not one .* neither clipped nor noised", found=None
    ),
    "7 a stop by a training metric": Case(
        task, images, "a value of the training samples", found=None, callback=EarlyStopping("train/loss")
    ),
    "7 a buffer counts samples": Case(
        lambda: task(Net(Counting())), images, "a training step has changed", found=STORED
    ),
    "8 noise of float32": Case(task, images, None, ((SecretRandom, "normal", float32_noise),), NOISE),
    "9 images with a large constant": Case(
        lambda: task(wide_net()),
        lambda: images(lambda pixels: pixels.add_(1e5)),
        None,
        ((Product, "_centre", lambda self, part: 0.0), (Product, "_rounding_of_sums", lambda self, part: 0.0)),
        BOUND,
    ),
    "10 masks that are public": Case(
        lambda: task(Net(nn.Dropout(0.5))), images, None, ((SecretRandom, "seed", lambda *args: 7),), MASKS
    ),
    "11 checkpoints share a block": Case(
        lambda: task(Twice()), images, None, ((PerSampleGradients, "_add_earlier", lambda *args: None),), BOUND
    ),
    "12 masks are scaled by all of them": Case(lambda: task(Net(DropBlock2d(0.3, 1))), images, MIXES),
}
"""All but 6, the report of another run in the same directory: see tests/privacy/test_continuation.py."""


def findings(tmp_path, case, **settings):
    """Train with an audit, and return what it finds."""
    audit = PrivacyAudit()
    others = [case.callback] if case.callback else []
    run = trainer(tmp_path, privacy(**({"max_grad_norm": 0.2} | settings)), audit, *others, max_epochs=5)
    run.fit(case.module(), case.data())
    return {finding.name for finding in audit.findings if not finding.passed}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_case_is_refused_or_harmless(tmp_path, case):
    if case.refused is None:
        assert findings(tmp_path, case) == set()
    else:
        run = trainer(tmp_path, privacy(), *([case.callback] if case.callback else []), max_epochs=1)
        with pytest.raises((ValueError, RuntimeError), match=case.refused):
            run.fit(case.module(), case.data())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.found])
def test_the_audit_finds_it_where_nothing_protects(tmp_path, monkeypatch, name):
    case = CASES[name]
    for owner, attribute, value in case.unprotected:
        monkeypatch.setattr(owner, attribute, value)
    assert case.found in findings(tmp_path, case, check=False)
