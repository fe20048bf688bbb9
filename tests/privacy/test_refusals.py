"""What is refused before any data is read."""

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, SpikeDetection, StochasticWeightAveraging
from privacy.private_runs import SAMPLES, Net, privacy, task, trainer
from standins import RandomData
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from knlightning.data import Sampling
from knlightning.privacy.refusals import check_data, check_run

REFUSED = {
    "batch normalization": (
        {"net": Net(nn.BatchNorm2d(4))},
        {},
        r"backbone.1 \(BatchNorm2d\) mixes .* Use norm layer, .*FrozenBatchNorm2d.*kernel_normalize",
    ),
    "a subclass of it without parameters": (
        {"net": Net(nn.SyncBatchNorm(4, affine=False))},
        {},
        r"backbone.1 \(SyncBatchNorm\)",
    ),
    "running statistics": ({"net": Net(nn.InstanceNorm2d(4, track_running_stats=True))}, {}, "keeps statistics"),
    "a layer without a rule": ({"net": Net(nn.GRU(4, 4))}, {}, r"backbone.1 \(GRU\): there is no rule"),
    "mixup": ({"mixup_alpha": 0.2}, {}, "mixup and cutmix put two samples into one"),
    "compiled": ({"compile": True}, {}, "is compiled"),
    "gradient clipping": ({}, {"gradient_clip_val": 1.0}, "clips the noisy sum"),
    "half precision": ({}, {"precision": "bf16-true"}, "precision bf16-true is too coarse"),
    "overfitting": ({}, {"overfit_batches": 1}, "not drawn at random"),
    "a finder": ({}, {"callback": LearningRateFinder()}, "LearningRateFinder takes steps that are not counted"),
    "compiled by torch": ({"net": torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))}, {}, "is compiled"),
    "a detector of spikes": ({}, {"callback": SpikeDetection()}, "SpikeDetection ends the run by its training loss"),
    "averaging": ({}, {"callback": StochasticWeightAveraging(0.1)}, "use knlightning.callbacks.EMA"),
}


@pytest.mark.parametrize(("of_task", "of_trainer", "message"), REFUSED.values(), ids=REFUSED)
def test_what_private_training_cannot_be_combined_with(tmp_path, of_task, of_trainer, message):
    settings = dict(of_trainer)
    run = trainer(tmp_path, *filter(None, [settings.pop("callback", None)]), **settings)
    with pytest.raises(ValueError, match=message):
        check_run(run, task(**of_task))


def test_samples_that_are_not_drawn_once_and_alike_are_refused():
    data = RandomData(SAMPLES, 5)
    check_data(data)
    check_data(None)
    data.sampling = Sampling(repeats=4)
    with pytest.raises(ValueError, match=r"repeated_augmentation to 1, and views"):
        check_data(data)
    data.sampling, data.balanced_sampling = Sampling(), True
    with pytest.raises(ValueError, match=r"balanced_sampling of the datamodule is not: set it to false"):
        check_data(data)


def test_refused_before_any_data_is_read(tmp_path):
    """By `knl fit`, which asks at once, and by a trainer."""
    data = RandomData(SAMPLES, 5)
    data.train_dataloader = None
    callback, module = privacy(), task(Net(nn.BatchNorm2d(4)))
    run = trainer(tmp_path, callback)
    with pytest.raises(ValueError, match=r"BatchNorm2d\) mixes the samples"):
        callback.check_before(run, module, data)
    with pytest.raises(ValueError, match=r"BatchNorm2d\) mixes the samples"):
        run.fit(module, data)


def test_a_frozen_batch_normalization_is_private(tmp_path):
    """What the refusal of others tells of works."""
    module = task(Net(FrozenBatchNorm2d(4)))
    check_run(trainer(tmp_path), module)
    trainer(tmp_path, privacy(), max_epochs=1).fit(module, RandomData(SAMPLES, 5))
