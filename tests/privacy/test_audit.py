"""The audit passes sound runs, and finds each of the faults that it is there for."""

import sys
from dataclasses import replace

import pytest
import torch
from privacy.private_runs import SAMPLES, privacy, task, trainer
from standins import RandomData

from knlightning.privacy import DifferentialPrivacy, clipping
from knlightning.privacy.audit import PrivacyAudit
from knlightning.privacy.randomness import SecretRandom


def audited(tmp_path, callback):
    audit = PrivacyAudit(4)
    run = trainer(tmp_path, callback, audit, max_epochs=5)
    run.fit(task(), RandomData(SAMPLES, 5))
    assert run.global_step == 0
    return {finding.name: finding for finding in audit.findings}


def failed(findings):
    return {name for name, finding in findings.items() if not finding.passed}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"physical_batch_size": 2, "clipping": "automatic"},
        {"max_physical_batch_size": 3, "accountant": "prv", "secure_mode": True},
    ],
)
def test_a_sound_run_passes(tmp_path, settings):
    findings = audited(tmp_path, privacy(noise_multiplier=2.0, **settings))
    assert not failed(findings), findings
    assert len(findings) == 11


def test_gradients_that_are_clipped_too_little(tmp_path, monkeypatch):
    monkeypatch.setattr(clipping, "clipping_weights", lambda norms, bound, kind: torch.full_like(norms, 3.0))
    assert failed(audited(tmp_path, privacy())) == {"a sample changes a step by no more than the bound"}


def test_sums_that_do_not_come_from_samples(tmp_path, monkeypatch):
    pop = clipping.ClippedSum.pop
    monkeypatch.setattr(clipping.ClippedSum, "pop", lambda self: pop(self) + 1e-3)
    assert "a step without samples is empty" in failed(audited(tmp_path, privacy(noise_multiplier=2.0)))


class LittleNoise(DifferentialPrivacy):
    def noisy_gradient(self, trainer, step):
        before, self.plan = self.plan, replace(self.plan, noise_multiplier=0.97 * self.plan.noise_multiplier)
        try:
            return super().noisy_gradient(trainer, step)
        finally:
            self.plan = before


class OldNoise(DifferentialPrivacy):
    def noisy_gradient(self, trainer, step):
        return super().noisy_gradient(trainer, 0)


@pytest.mark.parametrize(
    ("kind", "fault"), [(LittleNoise, "noise of the stated scale"), (OldNoise, "noise is new at each step")]
)
def test_wrong_noise(tmp_path, kind, fault):
    callback = kind(noise_multiplier=1.0, target_delta=1e-3, accountant="rdp", seed=0)
    assert fault in failed(audited(tmp_path, callback))


def test_noise_of_another_kind(tmp_path, monkeypatch):
    """Values of float32 are one of the cases in test_what_breaks_privacy.py."""

    def uniform(self, count, purpose, step, device):
        generator = torch.Generator().manual_seed(step % 1000)
        return (torch.rand(count, generator=generator, dtype=torch.float64) - 0.5) * 12**0.5

    monkeypatch.setattr(SecretRandom, "normal", uniform)
    assert failed(audited(tmp_path, privacy())) == {"noise is Gaussian"}


def test_batches_of_a_fixed_size(tmp_path, monkeypatch):
    def fixed(self, count, rate, step):
        return self.permutation(count, "order", step)[: round(rate * count)]

    monkeypatch.setattr(SecretRandom, "chosen", fixed)
    assert failed(audited(tmp_path, privacy())) == {"Poisson sampling at the stated rate"}
    assert failed(audited(tmp_path, privacy(poisson_sampling=False))) == {"Poisson sampling"}


def test_an_accountant_that_understates(tmp_path):
    findings = audited(tmp_path, privacy(accountant="gdp", noise_multiplier=2.0))
    assert failed(findings) == {"epsilon is not understated"}


@pytest.mark.parametrize(("accountant", "noise"), [("pld", 2.0), ("pld", 100.0), ("rdp", 100.0)])
def test_each_accountant_is_held_against_another_library(tmp_path, accountant, noise):
    """Also where epsilon is small, and what the other is rounded by must be small too."""
    findings = audited(tmp_path, privacy(accountant=accountant, noise_multiplier=noise))
    assert failed(findings) == set()
    assert ("by Opacus" if accountant == "pld" else "by dp-accounting") in findings["epsilon is not understated"].text


def test_a_run_without_noise_fails(tmp_path):
    assert "noise of the stated scale" in failed(audited(tmp_path, privacy(noise_multiplier=0.0)))


def test_samples_out_of_range():
    with pytest.raises(ValueError, match="samples must be a whole number at least 1"):
        PrivacyAudit(0)


def test_the_independent_accountant_is_asked_for_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ValueError, match=r"pip install 'knlightning\[privacy\]'"):
        PrivacyAudit()
