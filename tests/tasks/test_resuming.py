"""Runs that go on with another configuration than they were begun with."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from standins import RandomData, TinyNet, trainer
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, MultiStepLR, OneCycleLR, SequentialLR, StepLR

from knlightning.tasks import ClassificationTask, CosineLR, PolyLR

# the loader here begins its order anew, and only the rates are looked at
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")


class Rates(ClassificationTask):
    """Notes the learning rate and the momentum of each batch."""

    def __init__(self, schedule=None, interval="step", optimizer=lambda p: SGD(p, lr=0.4, momentum=0.5)):
        super().__init__(TinyNet(3), optimizer=optimizer, lr_scheduler=schedule, lr_scheduler_interval=interval)
        self.rates, self.momenta = [], []

    def on_train_batch_start(self, batch, batch_idx):
        group = self.trainer.optimizers[0].param_groups[0]
        self.rates.append(group["lr"])
        self.momenta.append(group.get("momentum"))


def fit(tmp_path, task, batch_size=4, ckpt_path=None, callbacks=(), **kwargs):
    """Train on 12 images; 3 steps an epoch unless the batch size says otherwise."""
    run = trainer(tmp_path, *callbacks, **kwargs)
    run.fit(task, RandomData(samples=12, batch_size=batch_size), ckpt_path=ckpt_path)
    return run


def begun(tmp_path, task, **kwargs):
    run = fit(tmp_path, task, **{"max_epochs": 2, **kwargs})
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    return tmp_path / "a.ckpt"


def one_cycle(total):
    return lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=total)


def falling(total, power=0.9):
    return [0.4 * (1 - step / total) ** power for step in range(total)]


# 2 epochs of 3 steps are over


@pytest.mark.parametrize(
    ("change", "total"),
    [
        ({"batch_size": 6}, 6 + 2 * 2),
        ({"batch_size": 2}, 6 + 2 * 6),
        ({"accumulate_grad_batches": 2}, 6 + 2 * 2),
        ({"limit_train_batches": 1}, 6 + 2),
        ({"max_epochs": 3}, 6 + 3),
        ({"max_epochs": -1, "max_steps": 11}, 11),
        ({"batch_size": 1, "max_steps": 8}, 8),
    ],
)
def test_schedule_by_step_ends_with_the_run_whatever_its_steps(tmp_path, change, total):
    path = begun(tmp_path, Rates(PolyLR), max_epochs=2)
    resumed = Rates(PolyLR)
    run = fit(tmp_path, resumed, ckpt_path=path, **{"max_epochs": 4, **change})
    assert run.global_step == total
    assert list(dict.fromkeys(resumed.rates)) == pytest.approx(falling(total)[6:])


def test_length_that_was_counted_at_a_resume_stays(tmp_path):
    path = begun(tmp_path, Rates(PolyLR))
    resumed = Rates(PolyLR)
    fit(tmp_path, resumed, 6, path, max_epochs=4, limit_train_batches=2).save_checkpoint(path, weights_only=False)
    assert torch.load(path, weights_only=True)["configured"]["schedule"]["total"] == 10
    again = Rates(PolyLR)
    run = fit(tmp_path, again, 6, path, max_epochs=5)
    assert run.lr_scheduler_configs[0].scheduler.total == 12


@pytest.mark.parametrize(
    ("before", "schedule", "stopped"),
    [
        *((lambda o: PolyLR(o, total=12), PolyLR, stopped) for stopped in (4, 6, 7)),
        (lambda o: StepLR(o, 5, 0.3), lambda o: StepLR(o, 5, 0.3), 7),
        (lambda o: MultiStepLR(o, [2, 9]), lambda o: MultiStepLR(o, [2, 9]), 6),
    ],
)
def test_unchanged_run_keeps_length_and_schedule_wherever_it_was_stopped(tmp_path, before, schedule, stopped):
    whole = Rates(schedule)
    fit(tmp_path, whole, max_epochs=4)
    path = begun(tmp_path, Rates(before), max_epochs=4, max_steps=stopped)
    resumed = Rates(schedule)
    fit(tmp_path, resumed, ckpt_path=path, max_epochs=4)
    assert resumed.rates == whole.rates[stopped:]


@pytest.mark.parametrize("schedule", [PolyLR, lambda o: CosineLR(o, warmup=1), lambda o: StepLR(o, 2, 0.5)])
@pytest.mark.parametrize("intervals", [("epoch", "step"), ("step", "epoch")])
def test_another_interval_keeps_the_place(tmp_path, schedule, intervals):
    path = begun(tmp_path, Rates(schedule, intervals[0]))
    resumed, whole = Rates(schedule, intervals[1]), Rates(schedule, intervals[1])
    fit(tmp_path, resumed, ckpt_path=path, max_epochs=4)
    fit(tmp_path, whole, max_epochs=4)
    assert resumed.rates == pytest.approx(whole.rates[6:])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (one_cycle(6), one_cycle(12)),
        (PolyLR, CosineLR),
        (lambda o: PolyLR(o, power=1.0), lambda o: PolyLR(o, power=2.0)),
        (lambda o: CosineLR(o, warmup=1), lambda o: CosineLR(o, warmup=8, warmup_start=0.5)),
        (lambda o: CosineLR(o, total=2), CosineLR),
        (lambda o: CosineAnnealingLR(o, 6), PolyLR),
        (lambda o: CosineAnnealingLR(o, 6), lambda o: CosineAnnealingLR(o, 12)),
        (lambda o: MultiStepLR(o, [2, 9]), lambda o: MultiStepLR(o, [2, 9], gamma=0.5)),
        (PolyLR, lambda o: SequentialLR(o, [ConstantLR(o, 0.1, 4), StepLR(o, 3)], [4])),
        (lambda o: SequentialLR(o, [ConstantLR(o, 0.1, 4), StepLR(o, 3)], [4]), one_cycle(12)),
        (None, PolyLR),
        (one_cycle(6), None),
    ],
)
def test_another_schedule_goes_on_as_if_it_had_been_there_from_the_beginning(tmp_path, before, after):
    path = begun(tmp_path, Rates(before))
    resumed, whole = Rates(after), Rates(after)
    fit(tmp_path, resumed, ckpt_path=path, max_epochs=4)
    fit(tmp_path, whole, max_epochs=4)
    assert resumed.rates == whole.rates[6:]
    assert resumed.momenta == whole.momenta[6:]


def test_schedule_that_ends_before_the_run_is_refused_before_any_step(tmp_path):
    path = begun(tmp_path, Rates(one_cycle(6)))
    resumed = Rates(one_cycle(6))
    with pytest.raises(ValueError, match=r"OneCycleLR ends after total_steps=6, and the run takes 12 .* set"):
        fit(tmp_path, resumed, ckpt_path=path, max_epochs=4)
    assert not resumed.rates


# another optimizer


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=0.01)),
        (lambda p: AdamW(p, lr=0.01), lambda p: SGD(p, lr=0.1, momentum=0.9)),
        (lambda p: AdamW(p, lr=0.01), lambda p: AdamW(p, lr=0.02, amsgrad=True)),
        (lambda p: RMSprop(p, lr=0.01), lambda p: RMSprop(p, lr=0.01, momentum=0.5, centered=True)),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_another_optimizer_begins_without_moments_and_says_so(tmp_path, before, after, earlier):
    path = begun(tmp_path, Rates(PolyLR, optimizer=before))
    if earlier:  # a checkpoint that does not name its optimizer
        stored = torch.load(path, weights_only=True)
        for key in ("optimizer", "scheduler", "interval", "length"):
            del stored["configured"][key]
        torch.save(stored, path)
    resumed, whole = Rates(PolyLR, optimizer=after), Rates(PolyLR, optimizer=after)
    with pytest.warns(UserWarning, match=r"optimizer of the checkpoint .* begins without any"):
        run = fit(tmp_path, resumed, ckpt_path=path, max_epochs=4)
    fit(tmp_path, whole, max_epochs=4)
    assert resumed.rates == whole.rates[6:]
    assert resumed.momenta == whole.momenta[6:]
    states = run.optimizers[0].state.values()
    assert {int(state["step"]) for state in states if "step" in state} <= {6}


def test_same_optimizer_keeps_its_moments_when_its_options_change(tmp_path):
    path = begun(tmp_path, Rates(optimizer=lambda p: Adam(p, lr=0.01)))
    run = fit(tmp_path, Rates(optimizer=lambda p: Adam(p, lr=0.02, betas=(0.8, 0.9))), ckpt_path=path, max_epochs=4)
    assert {int(state["step"]) for state in run.optimizers[0].state.values()} == {12}
    assert run.optimizers[0].param_groups[0]["betas"] == (0.8, 0.9)


# callbacks


def test_time_of_earlier_jobs_does_not_count_for_max_time(tmp_path):
    path = begun(tmp_path, Rates(), max_time="00:00:00:30")
    stored = torch.load(path, weights_only=True)
    stored["callbacks"]["Timer"]["time_elapsed"]["train"] = 40.0
    torch.save(stored, path)
    assert fit(tmp_path, Rates(), ckpt_path=path, max_epochs=4, max_time="00:00:00:30").global_step == 12


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (3, 4), (9, 6)])
def test_configured_patience_wins_over_the_checkpoint(tmp_path, patience, epochs):
    def stopping(patience):
        return [EarlyStopping("val/loss", min_delta=1e9, patience=patience)]  # stops after so many epochs and one

    path = begun(tmp_path, Rates(), callbacks=stopping(1), max_epochs=6)
    assert torch.load(path, weights_only=True)["global_step"] == 6
    resumed = fit(tmp_path, Rates(), ckpt_path=path, callbacks=stopping(patience), max_epochs=6)
    assert resumed.global_step == 3 * epochs


# checkpoints from elsewhere


def test_checkpoint_without_a_configuration_restores_the_schedule(tmp_path):
    path = begun(tmp_path, Rates(lambda o: StepLR(o, 4, 0.5)))
    stored = torch.load(path, weights_only=True)
    del stored["configured"]
    torch.save(stored, path)
    resumed = Rates(lambda o: StepLR(o, 4, 0.5))
    fit(tmp_path, resumed, ckpt_path=path, max_epochs=3)
    assert resumed.rates == [0.2, 0.2, 0.1]


def test_network_from_a_checkpoint_begins_a_new_run(tmp_path):
    path = begun(tmp_path, Rates(PolyLR))
    task = Rates.load_from_checkpoint(path, schedule=PolyLR, strict=True)
    fit(tmp_path, task, max_epochs=2)
    assert task.rates == pytest.approx(falling(6))
