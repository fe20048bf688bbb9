"""What a sample can change before the loss, through collation and the hooks of batches."""

import pytest
import torch
from lightning.pytorch import Callback
from privacy.private_runs import SAMPLES, privacy, task, trainer
from standins import RandomData
from torch.utils.data import DataLoader, Dataset, default_collate

from knlightning.data import DigitsDataModule
from knlightning.privacy.batch_hooks import HOOKS
from knlightning.protocols import batch_independent

BOUND = 0.7


def mixed(batch):
    images, labels = batch
    return 0.5 * images + 0.5 * images.roll(1, 0), labels


def standardized(batch):
    images, labels = batch
    return (images - images.mean()) / images.std(unbiased=False), labels


class Mixing(RandomData):
    """SAMPLES images, sample 0 as it is, or another one; `mix` is what some method does with a batch."""

    def __init__(self, other):
        super().__init__(SAMPLES, SAMPLES)
        if other:
            self.dataset.tensors[0][0] = 40 * torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(9))
            self.dataset.tensors[1][0] = (self.dataset.tensors[1][0] + 1) % 3


def mixing_hook(name):
    return type(name, (Mixing,), {name: lambda self, batch, *args, **kwargs: self.mix(batch)})


class MixingCollate(Mixing):
    def train_dataloader(self):
        return DataLoader(self.dataset, SAMPLES, collate_fn=lambda samples: self.mix(default_collate(samples)))


class AllAtOnce(Dataset):
    """Mixes what is read at once."""

    def __init__(self, dataset, mix):
        self.dataset, self.mix = dataset, mix

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices):
        images, labels = self.mix(default_collate([self.dataset[i] for i in indices]))
        return list(zip(images, labels, strict=True))


class MixingRead(Mixing):
    def train_dataloader(self):
        return DataLoader(AllAtOnce(self.dataset, self.mix), SAMPLES)


def sum_of_a_step(tmp_path, data):
    """Take one step of all samples without noise, and return the sum of the clipped gradients."""
    module = task(lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in module.parameters()]).double()
    run = trainer(tmp_path, privacy(noise_multiplier=0.0, max_grad_norm=BOUND), max_epochs=1)
    run.fit(module, data)
    assert run.global_step == 1
    return (torch.cat([p.detach().flatten() for p in module.parameters()]).double() - before) * -SAMPLES


KINDS = {name: mixing_hook(name) for name in HOOKS} | {"collate_fn": MixingCollate, "__getitems__": MixingRead}


@pytest.mark.parametrize(("name", "mix"), [*((name, standardized) for name in KINDS), ("collate_fn", mixed)])
def test_no_sample_changes_another_before_the_loss(tmp_path, name, mix):
    """Whatever hooks and collation do with a batch: they see one sample at a time. Replaced, it counts twice."""
    kind = type(name, (KINDS[name],), {"mix": staticmethod(mix)})
    one, two = (sum_of_a_step(tmp_path, kind(other)) for other in (False, True))
    assert (one - two).norm() <= 2.0 * BOUND
    mean = mix(kind(True).dataset.tensors)[0].mean()  # with all samples at once, others would change
    assert not torch.isclose(mean, mix(kind(False).dataset.tensors)[0].mean())


def test_hooks_of_validation_and_of_later_runs_get_whole_batches(tmp_path):
    sizes = []

    class Counting(RandomData):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            sizes.append((self.trainer.training, len(batch[0])))
            return batch

    data = Counting(SAMPLES, 5)
    trainer(tmp_path, privacy(), max_epochs=1, limit_val_batches=1).fit(task(), data)
    assert {size for training, size in sizes if training} == {1}
    assert {size for training, size in sizes if not training} == {5}
    assert "on_after_batch_transfer" not in vars(data)


def test_a_hook_of_the_package_gets_whole_batches_until_it_is_overridden(tmp_path):
    def shown(images):
        sizes.append(len(images))
        return images

    class Few(DigitsDataModule):
        def load(self, split):
            return super().load(split).take(torch.arange(SAMPLES))

    class Marked(Few):
        @batch_independent()
        def augmentation(self, images):
            return shown(images)

    class Unmarked(Marked):
        def augmentation(self, images):
            return shown(images)

    for kind, whole in ((Marked, True), (Unmarked, False)):
        module, sizes = task(), []
        module.backbone[-1] = torch.nn.Linear(16, 10)
        trainer(tmp_path, privacy(), max_epochs=1).fit(module, kind(batch_size=10))
        assert (max(sizes) > 1) == whole


def test_a_hook_that_multiplies_samples_is_refused(tmp_path):
    class Crops(RandomData):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return torch.cat([batch[0], batch[0].flip(-1)]), torch.cat([batch[1], batch[1]])

    with pytest.raises(ValueError, match=r"on_after_batch_transfer made 8 images of 4.*set views"):
        trainer(tmp_path, privacy()).fit(task(), Crops(SAMPLES, 5))


def test_a_hook_that_gives_what_all_samples_share_is_refused(tmp_path):
    class Shared(RandomData):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [*batch, batch[0].mean()]

    with pytest.raises(ValueError, match=r"do not join: tensors of the shapes \(\)"):
        trainer(tmp_path, privacy()).fit(task(), Shared(SAMPLES, 5))


class ChangesInPlace(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        batch[0].mul_(2)


class ReplacesTensors(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        batch[0] = batch[0].roll(1, 0)


@pytest.mark.parametrize("callback", [ChangesInPlace(), ReplacesTensors()])
def test_a_batch_that_a_callback_changes_is_noticed(tmp_path, callback):
    with pytest.raises(RuntimeError, match="the training batch was changed after its transfer"):
        trainer(tmp_path, privacy(), callback).fit(task(), RandomData(SAMPLES, SAMPLES))


class Drawing(RandomData):
    """Notes what a hook draws from the global generator."""

    drawn = ()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            self.drawn = [*self.drawn, float(torch.rand(()))]
        return batch


def test_random_numbers_of_hooks_come_from_the_secret_key(tmp_path):
    """Global seeds are written into the run's configuration: with them, everybody would know each sample's numbers."""
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(0)
        data = Drawing(SAMPLES, 5)
        trainer(tmp_path, privacy(seed=seed), max_epochs=1).fit(task(), data)
        runs.append(list(data.drawn))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 4
    assert not set(runs[0]) & set(runs[2])
