"""Canaries are told apart where steps are not what is accounted for, and never more often than epsilon allows."""

import pytest
import torch
from privacy.private_runs import SAMPLES, privacy, task, trainer
from standins import RandomData
from torch.utils.data import Dataset

from knlightning.privacy import DifferentialPrivacy
from knlightning.privacy.audit import PrivacyAudit

MANY = 160


class Noting(Dataset):
    """Notes which samples are read in training."""

    def __init__(self, data):
        self.data, self.read = data, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.read.append(index)
        return self.data[index]


def attacked(tmp_path, callback, canaries=MANY, epochs=3, samples=MANY, batch=30):
    audit, data = PrivacyAudit(1, canaries), RandomData(samples, batch)
    data.dataset = Noting(data.dataset)
    run = trainer(tmp_path, callback, audit, max_epochs=epochs)
    run.fit(task(), data)
    return audit, run, data.dataset


def test_canaries_take_the_place_of_samples(tmp_path):
    callback = privacy(check=False, noise_multiplier=2.0)
    audit, run, data = attacked(tmp_path, callback, canaries=10, samples=SAMPLES, batch=5)
    assert run.global_step == 12
    assert len(set(audit.canaries.samples.tolist())) == 10
    assert "draw" not in vars(callback.loader)
    assert "noisy_gradient" not in vars(callback)
    drawn = torch.cat([callback.loader.draw(step) for step in range(12)])
    assert torch.isin(drawn, audit.canaries.samples).any()
    expected = [i for i in drawn.tolist() if i and i not in audit.canaries.samples]
    read = [i for i in data.read if i]  # sample 0 is read for the shape of empty batches, too
    assert read[-len(expected) :] == expected  # before, the audit reads any


def test_a_sound_run_is_not_told_more_of_than_epsilon_allows(tmp_path):
    callback = privacy(check=False, noise_multiplier=1.0)
    audit, _, _ = attacked(tmp_path, callback)  # of 12 steps
    finding = audit.findings[-1]
    assert finding.passed
    attack = audit.canaries.attack(callback.ledger.epsilon, 1e-3)
    assert attack.bound < callback.ledger.epsilon
    assert f"{callback.ledger.epsilon:.4g} is claimed" in finding.text


class Weak(DifferentialPrivacy):
    """Adds a fiftieth of the noise."""

    def noisy_gradient(self, trainer, step):
        noise, self.random.normal = self.random.normal, lambda *args: noise(*args) / 50
        try:
            return super().noisy_gradient(trainer, step)
        finally:
            self.random.normal = noise


class Everything(DifferentialPrivacy):
    """Takes part of the samples in all steps."""

    def on_train_start(self, trainer, module):
        super().on_train_start(trainer, module)
        self.loader.draw = lambda step: torch.arange(MANY)


@pytest.mark.parametrize("kind", [Weak, Everything])
def test_steps_that_are_not_what_is_accounted_for_are_told(tmp_path, kind):
    callback = kind(noise_multiplier=2.0, target_delta=1e-9, accountant="rdp", seed=5, check=False)
    audit, _, _ = attacked(tmp_path, callback, epochs=4, batch=8)
    assert not audit.findings[-1].passed, audit.findings[-1]
    assert audit.canaries.attack(callback.ledger.epsilon, 1e-9).bound > callback.ledger.epsilon


def test_canaries_that_cannot_be(tmp_path):
    with pytest.raises(
        ValueError, match=r"canaries must be at most 20, got 21.* there are 20 training samples and 163"
    ):
        attacked(tmp_path, privacy(check=False), canaries=21, samples=SAMPLES, batch=5)
    with pytest.raises(ValueError, match="canaries must be a whole number at least 0"):
        PrivacyAudit(1, -1)
