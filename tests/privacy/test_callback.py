"""The callback against a loop over single samples, and everything that it must not let pass."""

import copy
import json

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks.progress import TQDMProgressBar
from privacy.private_runs import SAMPLES, Net, naive, privacy, task, trainer
from standins import RandomData
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from knlightning.callbacks import EMA
from knlightning.checks import ArgumentError
from knlightning.data import DigitsDataModule
from knlightning.models import kernel_normalize
from knlightning.nn import KNConv2d
from knlightning.privacy import DifferentialPrivacy
from knlightning.privacy.accounting import epsilon
from knlightning.tasks import ClassificationTask


def converted():
    """A depthwise and a transposed convolution with statistics of their own."""
    convs = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.ConvTranspose2d(4, 4, 4, 2, 1)
    layers = [layer for conv in convs for layer in (conv, nn.BatchNorm2d(4), nn.Mish())]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return kernel_normalize(net, 0.0, group_statistics="own")[0]


CASES = {
    "one micro-batch": (Net, {}, {}, 5),
    "micro-batches, some empty": (Net, {"physical_batch_size": 1}, {}, 5),
    "micro-batches of 2": (Net, {"physical_batch_size": 2}, {}, 5),
    "accumulated": (Net, {}, {"accumulate_grad_batches": 2}, 3),
    "steps that are often empty": (Net, {}, {"max_epochs": 1}, 1),
    "a converted decoder": (converted, {}, {"max_epochs": 1}, 5),
}


@pytest.mark.parametrize(("make", "own", "settings", "batch"), CASES.values(), ids=CASES)
def test_equals_a_loop_over_single_samples(tmp_path, make, own, settings, batch):
    torch.manual_seed(0)
    data, module = RandomData(SAMPLES, batch), task(make())
    logical = batch * settings.get("accumulate_grad_batches", 1)
    callback, run = privacy(**own), trainer(tmp_path, **settings)
    run.callbacks.append(callback)
    steps = run.max_epochs * max(1, round(SAMPLES / logical))
    expected = naive(module, data.dataset, logical, steps)
    run.fit(module, data)
    assert run.global_step == steps
    assert callback.ledger.history == [(0.8, logical / SAMPLES, steps)]
    torch.testing.assert_close(dict(module.backbone.state_dict()), expected, rtol=1e-3, atol=2e-4)
    assert run.accumulate_grad_batches == settings.get("accumulate_grad_batches", 1)  # as it was
    assert "training_step" not in vars(module)
    assert all(p.requires_grad and not hasattr(p, "summed_grad") for p in module.parameters())


class Flipping(RandomData):
    """Shows an image as it is or mirrored, at random; the views of a sample come one after the other."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        flipped = torch.arange(len(images)) % 2 == 1
        return torch.where(flipped[:, None, None, None], images.flip(-1), images), labels


@pytest.mark.parametrize("physical", [None, 4])
def test_views_of_a_sample_are_averaged_before_they_are_clipped(tmp_path, physical):
    module, data = task(), Flipping(SAMPLES, 5)

    def both(net, image, label):
        return (F.cross_entropy(net(image), label) + F.cross_entropy(net(image.flip(-1)), label)) / 2

    expected = naive(module, data.dataset, 5, 8, loss=both)
    trainer(tmp_path, privacy(views=2, physical_batch_size=physical), max_epochs=2).fit(module, data)
    torch.testing.assert_close(dict(module.backbone.state_dict()), expected, rtol=1e-3, atol=2e-4)


def test_memory_that_can_be_planned(tmp_path):
    """A largest size of what goes through the network at once; steps are what they would be, and delta a bit more."""
    sizes = []

    class Sizes(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            sizes.append(len(batch[0]))

    module, data = task(), RandomData(SAMPLES, 5)
    expected = naive(module, data.dataset, 5, 12)
    callback = privacy(max_physical_batch_size=4)
    trainer(tmp_path, callback, Sizes()).fit(module, data)
    torch.testing.assert_close(dict(module.backbone.state_dict()), expected, rtol=1e-3, atol=2e-4)
    assert max(sizes) <= 4
    assert len(sizes) == 12 * callback.loader.micro_batches == 12 * 5  # 20 samples fit, and there are no more
    report = callback.report()
    assert report["accounted_delta"] == pytest.approx(0.999 * report["target_delta"])
    assert report["epsilon"] == epsilon([(0.8, 0.25, 12)], report["accounted_delta"], "rdp")


def test_loaders_of_any_source(tmp_path):
    data, module = RandomData(SAMPLES, 5), task()
    states = []
    loader = DataLoader(data.dataset, 5, shuffle=True)
    for source in ({"datamodule": data}, {"train_dataloaders": loader, "val_dataloaders": data.val_dataloader()}):
        trial = copy.deepcopy(module)
        trainer(tmp_path, privacy(), max_epochs=1).fit(trial, **source)
        states.append(trial.backbone.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_epochs_limits_and_bar_count_steps(tmp_path):
    seen = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            seen.append((batch_idx, self.total_train_batches))

    bar = Bar()
    run = trainer(
        tmp_path, bar, privacy(physical_batch_size=2), enable_progress_bar=True, limit_train_batches=3, max_epochs=2
    )
    run.fit(task(), RandomData(SAMPLES, 5))
    assert run.global_step == 6
    assert seen == [(0, 3), (1, 3), (2, 3)] * 2
    assert type(bar) is Bar
    assert run.limit_train_batches == 3


@pytest.mark.parametrize("least", [{}, {"min_epochs": 40, "min_steps": 150}])
def test_stops_when_the_budget_is_spent(tmp_path, capsys, least):
    callback = privacy(target_epsilon=8.0, noise_multiplier=0.8)
    run = trainer(tmp_path, callback, max_epochs=50, **least)
    run.fit(task(), RandomData(SAMPLES, 5))
    report = callback.report()
    assert 0 < run.global_step == callback.plan.affordable_steps < 150
    assert {name: getattr(run, name) for name in least} == least  # as it was
    assert report["epsilon"] <= 8.0
    printed = capsys.readouterr().out
    assert f"the budget is spent after step {run.global_step} of 200" in printed
    assert f"epsilon {report['epsilon']:.3f} at delta 0.001 (rdp), after {run.global_step} steps" in printed


def test_the_noise_is_found_for_the_budget(tmp_path):
    callback = privacy(target_epsilon=5.0, noise_multiplier=None)
    run = trainer(tmp_path, callback)
    run.fit(task(), RandomData(SAMPLES, 5))
    assert 4.99 <= callback.report()["epsilon"] <= 5.0
    assert callback.plan.num_steps == run.global_step == 12
    report = callback.state_dict()
    assert json.loads(json.dumps(report)) == report


def without_segments(report):
    """Leave out which start of a run has taken its steps."""
    return {name: value for name, value in report.items() if name != "segments"}


@pytest.mark.parametrize("noise", [0.8, None])
def test_resumed_from_a_checkpoint(tmp_path, noise):
    """As if never interrupted, with seeded draws; what was spent is counted on."""
    settings = {"noise_multiplier": noise, "target_epsilon": None if noise else 9.0, "physical_batch_size": 2}
    data, path = RandomData(SAMPLES, 5), tmp_path / "a.ckpt"
    whole, callback = task(), privacy(**settings)
    trainer(tmp_path, callback, Save(path)).fit(whole, data)
    (tmp_path / "privacy.json").unlink()  # the run is to look as if it had ended at the checkpoint
    stored = torch.load(path, weights_only=True)
    assert {name.split(".")[0] for name in stored["state_dict"]} == {"backbone"}
    resumed, again = task(), privacy(**settings)
    trainer(tmp_path, again).fit(resumed, data, ckpt_path=path)
    assert again.ledger.history == callback.ledger.history
    assert without_segments(again.report()) == without_segments(callback.report())
    for name, value in whole.backbone.state_dict().items():
        assert torch.equal(resumed.backbone.state_dict()[name], value)


class Save(Callback):
    """Writes a checkpoint after a step, in the middle of an epoch of four, or after its last micro-batch but one."""

    def __init__(self, path, within=False, step=7):
        self.path, self.within, self.step = path, within, step

    @property
    def state_key(self):
        return f"Save{self.step}"

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        steps, rest = divmod(trainer.fit_loop.total_batch_idx + 1, trainer.accumulate_grad_batches)
        if (steps, rest) == ((self.step - 1, trainer.accumulate_grad_batches - 1) if self.within else (self.step, 0)):
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_within_a_step_is_refused(tmp_path):
    callback, path = privacy(physical_batch_size=2), tmp_path / "a.ckpt"
    trainer(tmp_path, callback, Save(path, within=True)).fit(task(), RandomData(SAMPLES, 5))
    with pytest.raises(ValueError, match="written within a step, after 2 of its 3 micro-batches"):
        trainer(tmp_path, privacy(physical_batch_size=2)).fit(task(), RandomData(SAMPLES, 5), ckpt_path=path)


def test_later_checkpoints_beside_the_one_a_run_begins_from_count_too(tmp_path):
    data, old = RandomData(SAMPLES, 5), tmp_path / "old"
    path = old / "checkpoints" / "early.ckpt"
    trainer(old, privacy(), Save(path), Save(old / "checkpoints" / "late.ckpt", step=10)).fit(task(), data)
    again = privacy()
    trainer(tmp_path / "new", again).fit(task(), data, ckpt_path=path)
    assert again.ledger.history == [(0.8, 0.25, 10 + 5)]


def test_a_budget_holds_with_steps_that_are_taken_again(tmp_path):
    """Steps of later checkpoints were released, and so is what is trained in their place: all of them count."""
    data = RandomData(SAMPLES, 5)
    settings = {"noise_multiplier": None, "target_epsilon": 9.0}
    trainer(tmp_path, privacy(**settings), Save(tmp_path / "early.ckpt"), Save(tmp_path / "late.ckpt", step=10)).fit(
        task(), data
    )
    again = privacy(**settings)
    trainer(tmp_path, again).fit(task(), data, ckpt_path=tmp_path / "early.ckpt")
    assert [steps for _, _, steps in again.ledger.history] == [10, 5]
    assert again.plan.noise_multiplier > again.ledger.history[0][0]
    assert 8.9 < again.ledger.epsilon <= 9.0


def test_no_step_is_taken_when_the_budget_is_spent(tmp_path):
    data = RandomData(SAMPLES, 5)
    path = tmp_path / "a.ckpt"
    trainer(tmp_path, privacy(), Save(path)).fit(task(), data)
    with pytest.raises(ValueError, match=r"does not pay for another step with noise_multiplier 0\.8"):
        trainer(tmp_path, privacy(target_epsilon=0.5)).fit(task(), data, ckpt_path=path)


def test_noise_is_new_at_every_start_unless_seeded(tmp_path):
    def weights(**kwargs):
        module = task()
        trainer(tmp_path, privacy(**kwargs), max_epochs=1).fit(module, RandomData(SAMPLES, 5))
        return module.backbone[-1].weight.detach()

    assert torch.equal(weights(seed=1), weights(seed=1))
    assert not torch.equal(weights(seed=None), weights(seed=None))
    assert torch.isfinite(weights(seed=None, secure_mode=True)).all()


def test_a_sample_that_is_not_finite_contributes_nothing(tmp_path):
    """And does not end the run: that would tell of it."""
    spoilt, without = RandomData(SAMPLES, 5), RandomData(SAMPLES, 5)
    spoilt.dataset.tensors[0][3] = float("nan")
    without.dataset.tensors[0][3] = float("nan")
    module = task()
    expected = naive(module, without.dataset, 5, 8, leave_out=3)
    trainer(tmp_path, privacy(), max_epochs=2).fit(module, spoilt)
    torch.testing.assert_close(dict(module.backbone.state_dict()), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_digits_are_learned(tmp_path, precision):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.AvgPool2d(4), KNConv2d(3, 16, 3, 1, 1), nn.Mish(), KNConv2d(16, 16, 3, 2, 1), nn.Mish(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    module = ClassificationTask(net, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    data = DigitsDataModule(batch_size=256, eval_batch_size=360, augment=False)
    callback = DifferentialPrivacy(20.0, 1e-4, accountant="rdp", seed=0)
    run = trainer(tmp_path, callback, EMA(0.5), max_epochs=2, limit_val_batches=None, precision=precision)
    run.fit(module, data)
    assert run.callback_metrics["val/acc"] > 0.6  # 0.1 by guessing
    assert run.callback_metrics["privacy/epsilon"] <= 20.0


@pytest.mark.parametrize(
    ("settings", "batch", "message"),
    [
        ({}, 32, r"a step of 32 samples .* more than the 20 training samples"),
        ({"target_delta": 0.05}, 5, r"target_delta 0.05 must be below 1 / 20"),
    ],
)
def test_steps_and_delta_that_do_not_fit_the_samples(tmp_path, settings, batch, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, privacy(**settings)).fit(task(), RandomData(SAMPLES, batch))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number above 0, got 0.0"),
        ({"physical_batch_size": 0}, "physical_batch_size must be a whole number at least 1, or null for all images"),
        ({"clipping": "hard"}, "clipping must be one of flat, automatic, got 'hard'"),
        ({"max_physical_batch_size": 0}, "max_physical_batch_size must be a whole number at least 1, or null for no"),
        ({"max_physical_batch_size": 4, "physical_batch_size": 4}, "physical_batch_size must be null where max_"),
        ({"views": 0}, "views must be a whole number at least 1, got 0"),
    ],
)
def test_arguments_out_of_range(argument, message):
    with pytest.raises(ArgumentError, match=message):
        privacy(**argument)


def test_a_step_that_goes_by_the_callback_is_noticed(tmp_path):
    class Sly(ClassificationTask):
        def on_before_optimizer_step(self, optimizer):
            self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed += 1

    with pytest.raises(RuntimeError, match="the weights are not private"):
        trainer(tmp_path, privacy()).fit(task(kind=Sly), RandomData(SAMPLES, 5))


def test_a_task_need_not_be_ours(tmp_path):
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def validation_step(self, batch, batch_idx):
            pass

        def training_step(self, batch, batch_idx):
            return {"loss": F.cross_entropy(self.net(batch[0]), batch[1])}

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    callback = privacy()
    trainer(tmp_path, callback, max_epochs=1).fit(Plain(), RandomData(SAMPLES, 5))
    assert callback.ledger.history == [(0.8, 0.25, 4)]
