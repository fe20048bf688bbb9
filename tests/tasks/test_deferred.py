from functools import partial

import pytest
import torch
from standins import RandomData, RandomScenes, TinyFCN, TinyNet, trainer
from torch.nn import functional as F

from knlightning.callbacks import LastCheckpoint
from knlightning.tasks import ClassificationTask, SegmentationTask
from knlightning.tasks.deferred import DeferredChecks, check_finite, labels_within


class Arrival:
    """Stands in for an event of a CUDA device."""

    here = False

    def query(self):
        return self.here

    def synchronize(self):
        pass


@pytest.fixture
def arrival(monkeypatch):
    """Let values be copied as from a CUDA device; they arrive when the fixture says so."""
    event = Arrival()
    monkeypatch.setattr("knlightning.tasks.deferred.copied_to_host", lambda values: (values.clone(), event))
    return event


def test_values_on_the_host_are_looked_at_at_once():
    with pytest.raises(FloatingPointError, match="the training loss is nan at batch 3"):
        DeferredChecks().add(torch.tensor(torch.nan), partial(check_finite, "batch 3"))


def test_values_of_a_device_are_looked_at_when_they_have_arrived_or_are_waited_for(arrival):
    checks = DeferredChecks()
    assert not checks.add(torch.tensor(torch.inf), partial(check_finite, "batch 3"))
    checks.look()
    arrival.here = True
    with pytest.raises(FloatingPointError, match="inf at batch 3"):
        checks.add(torch.tensor(1.0), partial(check_finite, "batch 4"))
    checks.look(wait=True)  # nothing is left
    arrival.here = False
    checks.add(torch.tensor(torch.nan), partial(check_finite, "batch 5"))
    with pytest.raises(FloatingPointError, match="nan at batch 5"):
        checks.look(wait=True)
    checks.add(torch.tensor(torch.nan), partial(check_finite, "batch 6"))
    checks.forget()
    checks.look(wait=True)


@pytest.mark.parametrize(("wrong", "said"), [([0, 3, 7, 255], 7), ([0, -2, 2, 255], -2)])
def test_labels_that_are_no_classes_are_named_and_harmless_until_then(arrival, wrong, said):
    checks = DeferredChecks()
    labels = labels_within(checks, torch.tensor(wrong), 3, "label {label}", 255)
    assert ((labels[:3] >= 0) & (labels[:3] < 3)).all()
    assert labels[3] == 255
    with pytest.raises(ValueError, match=f"^label {said}$"):
        checks.look(wait=True)
    right = torch.tensor([0, 2, 255, 1])
    assert torch.equal(labels_within(checks, right, 3, "", 255), right)
    assert torch.equal(labels_within(checks, right[:0], 3, "", 255), right[:0])
    checks.look(wait=True)


@pytest.mark.parametrize(
    ("error", "said"), [(FloatingPointError, "loss is nan at epoch 0, batch 0"), (ValueError, "label 77")]
)
@pytest.mark.parametrize(("data", "task"), [(RandomData, ClassificationTask), (RandomScenes, SegmentationTask)])
def test_a_run_ends_before_its_checkpoint(tmp_path, arrival, monkeypatch, data, task, error, said):
    data, task = data(), task(TinyNet(3) if data is RandomData else TinyFCN(3))
    labels = data.dataset.tensors[1]
    if error is ValueError:
        labels[2] = 77
    else:
        monkeypatch.setattr(F, "cross_entropy", lambda logits, *_, **__: logits.sum(1) * torch.nan)
    settings = {"enable_checkpointing": True, "num_sanity_val_steps": 0, "max_epochs": 1}
    run = trainer(tmp_path, LastCheckpoint(every_n_steps=2), **settings)
    with pytest.raises(error, match=said):
        run.fit(task, data)
    assert run.global_step == 2  # no step has waited
    assert not list(tmp_path.rglob("*.ckpt"))
