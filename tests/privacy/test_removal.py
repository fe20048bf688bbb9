"""Samples are removed through the whole pipeline, and the others keep their random numbers."""

import pytest
import torch
from lightning.pytorch import Callback
from privacy.private_runs import SAMPLES, Net, privacy, task, trainer
from standins import RandomData
from torch import nn

from knlightning.nn import KNConv2d
from knlightning.privacy.randomness import SecretRandom
from knlightning.privacy.removal import remove_samples


class Removing(Callback):
    """Removes samples when a training begins, and ends it."""

    def on_train_start(self, trainer, module):
        private = next(c for c in trainer.callbacks if type(c).__name__ == "DifferentialPrivacy")
        self.before = private.random.key
        self.found = remove_samples(trainer, module, private, 6)
        assert private.random.key == self.before
        assert "log" not in vars(module) or module.log.__name__ == "log"
        trainer.should_stop = True


def removed(tmp_path, module, data=None, **settings):
    removing = Removing()
    private = privacy(check=False, **({"max_grad_norm": 1e3} | settings))
    trainer(tmp_path, private, removing, max_epochs=1).fit(module, data or RandomData(SAMPLES, 10))
    return removing.found


class Noisy(RandomData):
    """Draws for a whole batch in a hook."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + torch.rand_like(batch[0]), batch[1]]


class Bernoulli(nn.Module):
    """Draws by the values of a tensor."""

    def forward(self, x):
        return x * torch.bernoulli(torch.full_like(x, 0.5))


def random_net():
    convolution, head = KNConv2d(3, 4, 3, 2, 1, dropout_p=0.3), nn.Linear(64, 3)
    return nn.Sequential(convolution, Bernoulli(), nn.Dropout(0.5), nn.Flatten(), head)


@pytest.mark.parametrize(
    ("net", "settings"),
    [(Net, {}), (random_net, {}), (random_net, {"physical_batch_size": 4}), (random_net, {"views": 2})],
)
def test_what_a_removal_changes_is_what_the_sample_contributes(tmp_path, net, settings):
    """With a bound that clips nothing, other samples' gradients would show if they moved."""
    torch.manual_seed(0)
    loose = removed(tmp_path, task(net()), Noisy(SAMPLES, 10), **settings)
    assert len(loose.changes) == 6
    assert len(set(loose.changes)) == 6
    bounded = removed(tmp_path, task(net()), Noisy(SAMPLES, 10), max_grad_norm=1e-3, **settings)
    assert max(bounded.excesses) <= 1
    assert min(bounded.changes) > 0.99e-3  # each is clipped
    for found in (loose, bounded):
        assert (found.empty, found.stored, found.public) == (0.0, "", "")


@pytest.mark.parametrize(
    ("seed", "said"),
    [(lambda *args: 7, "are the same for another secret key"), (lambda *args: torch.initial_seed(), "the global seed")],
)
def test_masks_that_are_not_secret(tmp_path, monkeypatch, seed, said):
    monkeypatch.setattr(SecretRandom, "seed", seed)
    assert said in removed(tmp_path, task(random_net())).public
