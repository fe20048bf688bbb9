"""Which parameters a private run trains, and that no other is moved by the samples."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning
from privacy.private_runs import SAMPLES, naive, privacy, task, trainer
from standins import RandomData
from torch import nn

from knlightning.models import fine_tuned
from knlightning.tasks import ClassificationTask


class Finetuning(BaseFinetuning):
    """Lightning's own way to train the head first and the rest from some epoch on."""

    def freeze_before_training(self, module):
        self.freeze(module.backbone[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.backbone[0], optimizer, lr=0.5)


class Unfreezing(Callback):
    """Makes all parameters trainable when an epoch begins."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            module.backbone[0].requires_grad_()


class Noise(Callback):
    """Notes the gradients that the optimizer gets."""

    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.seen.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("way", ["finetuning", "requires_grad_"])
def test_parameters_that_are_unfrozen_are_clipped_and_noised(tmp_path, way):
    module, noise, private = task(), Noise(), privacy(noise_multiplier=100.0)
    if way == "requires_grad_":
        module.backbone[0].requires_grad_(False)
        unfreezing = Unfreezing()
    else:
        unfreezing = Finetuning()
        module.make_optimizer = lambda params: torch.optim.SGD([p for p in params if p.requires_grad], lr=0.5)
    run = trainer(tmp_path, private, unfreezing, noise, max_epochs=2)
    run.fit(module, RandomData(SAMPLES, 5))
    first, last = noise.seen[1], noise.seen[-1]
    assert set(first) == {"backbone.4.weight", "backbone.4.bias"}
    assert set(last) == {name for name, _ in module.named_parameters()}
    spread = torch.cat([gradient.flatten() for gradient in last.values()]).std() * 5 / 0.7
    assert 80 < spread < 120  # the noise is on all of them
    assert private.ledger.history == [(100.0, 0.25, 8)]


def test_a_pretrained_network_is_fine_tuned(tmp_path):
    """With frozen batch normalization, a trained part, LoRA and a new last layer."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
    ]
    net = fine_tuned(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9)), 3, None, ["4"], 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trainer(tmp_path, privacy(), max_epochs=1).fit(task(net), RandomData(SAMPLES, 5))
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"2.down.weight", "2.up.weight", "4.weight", "4.bias", "8.weight", "8.bias"}


def test_unfreezing_a_layer_that_mixes_samples_is_refused(tmp_path):
    class WeightedWhenUnfrozen(ClassificationTask):
        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return (loss * batch[0].mean()).mean() if self.backbone[0].weight.requires_grad else loss.mean()

    module = task(kind=WeightedWhenUnfrozen)
    module.backbone[0].requires_grad_(False)
    with pytest.raises(ValueError, match="the loss does not treat each sample by itself"):
        trainer(tmp_path, privacy(), Unfreezing(), max_epochs=2).fit(module, RandomData(SAMPLES, 5))


def test_unfreezing_within_a_step_is_refused(tmp_path):
    class InTheMiddle(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 1:
                module.backbone[0].requires_grad_()

    module = task()
    module.backbone[0].requires_grad_(False)
    run = trainer(tmp_path, privacy(physical_batch_size=5), InTheMiddle(), accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="frozen or unfrozen within a step"):
        run.fit(module, RandomData(SAMPLES, 10))


def test_a_step_that_an_epoch_leaves_unfinished_begins_anew(tmp_path):
    """Its samples are drawn again, and must not count twice."""

    class Leaving(ClassificationTask):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 and batch_idx == 7 else None

    module, data = task(kind=Leaving), RandomData(SAMPLES, 5)
    expected = naive(module, data.dataset, 5, 1 + 4)
    trainer(tmp_path, privacy(physical_batch_size=1, check=False), max_epochs=2).fit(module, data)
    torch.testing.assert_close(dict(module.backbone.state_dict()), expected, rtol=1e-3, atol=2e-4)


def test_a_step_of_several_draws_is_refused(tmp_path):
    """A sample would be in it twice, with the noise for once."""

    class Accumulating(Callback):
        def on_train_epoch_start(self, trainer, module):
            trainer.accumulate_grad_batches = 4

    run = trainer(tmp_path, privacy(physical_batch_size=3, check=False), Accumulating())
    with pytest.raises(RuntimeError, match="a step was taken after 4 micro-batches, and each has 2"):
        run.fit(task(), RandomData(SAMPLES, 5))


class Outside(ClassificationTask):
    """Trains a parameter that is in no module."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]) * self.kept[0], batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), self.kept[0]], lr=0.1)


def test_a_parameter_that_joins_the_optimizer_later_is_noticed(tmp_path):
    class Joining(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                module.kept[0].requires_grad_()
                trainer.optimizers[0].add_param_group({"params": module.kept, "lr": 0.1})

    class Plain(Outside):
        configure_optimizers = ClassificationTask.configure_optimizers

    module = task(kind=Plain)
    module.kept = [nn.Parameter(torch.ones(3), requires_grad=False)]
    with pytest.raises(ValueError, match="neither clipped nor noised"):
        trainer(tmp_path, privacy(), Joining(), max_epochs=2).fit(module, RandomData(SAMPLES, 5))


def test_a_step_that_shows_a_sample_in_several_rows_is_refused(tmp_path):
    class TwoCrops(ClassificationTask):
        def training_step(self, batch, batch_idx):
            images, labels = torch.cat([batch[0], batch[0].flip(-1)]), torch.cat([batch[1], batch[1]])
            return nn.functional.cross_entropy(self(images), labels)

    with pytest.raises(RuntimeError, match=r"were given \d+ samples, and the training step"):
        trainer(tmp_path, privacy(check=False)).fit(task(kind=TwoCrops), RandomData(SAMPLES, 5))


def test_weights_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the weights are not finite after step \d+, .* lower learning rate"):
        trainer(tmp_path, privacy(), max_epochs=3).fit(task(lr=1e38), RandomData(SAMPLES, 5))


class Dropping(nn.Module):
    """Notes the masks of dropout."""

    masks = ()

    def forward(self, x):
        mask = torch.rand(len(x), 1, 1, 1)
        if self.training:
            Dropping.masks = [*Dropping.masks, mask.flatten().tolist()]
        return x * mask


def test_dropout_comes_from_the_secret_key_and_leaves_the_global_generator_alone(tmp_path):
    runs = []
    for seed in (5, 5, 6):
        Dropping.masks = []
        module = task()
        module.backbone = nn.Sequential(Dropping(), module.backbone)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        trainer(tmp_path, privacy(seed=seed, check=False), max_epochs=1).fit(module, RandomData(SAMPLES, 5))
        assert torch.equal(torch.get_rng_state(), state)
        runs.append([value for mask in Dropping.masks for value in mask])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == len(runs[0]) > 4
    assert not set(runs[0]) & set(runs[2])


def test_float64_runs_get_noise_of_float64(tmp_path):
    """With noise of float32, the low bits of the gradient would be those of the sum."""
    data, noise = RandomData(SAMPLES, 5), Noise()
    data.dataset.tensors[0].fill_(float("nan"))  # no sample contributes: what is left is the noise
    trainer(tmp_path, privacy(check=False), noise, max_epochs=1, precision="64-true").fit(task().double(), data)
    values = torch.cat([gradient.flatten() for gradient in noise.seen[1].values()]) * 5 / (0.8 * 0.7)
    assert (values != values.float().double()).float().mean() > 0.9
    float32 = values.float().double()
    assert ((values - float32).abs() < 1e-6 * values.abs()).all()
    assert (torch.frexp(values).mantissa * 2**40 % 1).unique().numel() > len(values) // 2  # random to the last bits
