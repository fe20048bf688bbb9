import pytest
import torch
from lightning.pytorch import Trainer
from standins import RandomData, TinyNet
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

from knlightning.tasks import ClassificationTask, CosineLR


def fit(tmp_path, task, ckpt_path=None, **kwargs):
    run = Trainer(
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **kwargs,
    )
    run.fit(task, RandomData(), ckpt_path=ckpt_path)
    return run


def task(lr=0.4, weight_decay=0.0, schedule=None, interval="epoch"):
    return ClassificationTask(TinyNet(3), 0.0, lambda p: SGD(p, lr=lr, weight_decay=weight_decay), schedule, interval)


def rate(run):
    return run.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize(("interval", "total"), [("epoch", 3), ("step", 9)])
def test_cosine_lasts_as_long_as_the_run(tmp_path, interval, total):
    run = fit(tmp_path, task(schedule=lambda o: CosineLR(o, final=0.01), interval=interval), max_epochs=3)
    assert run.lr_scheduler_configs[0].scheduler.total == total  # 10 images in batches of 4: 3 steps an epoch
    assert rate(run) == pytest.approx(0.4 * 0.01)


def test_stated_length_stays(tmp_path):
    run = fit(tmp_path, task(schedule=lambda o: CosineLR(o, total=100)), max_epochs=1)
    assert run.lr_scheduler_configs[0].scheduler.total == 100


def test_run_without_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no end .*epoch.*max_epochs.*init_args.total"):
        fit(tmp_path, task(schedule=CosineLR), max_epochs=-1, max_steps=5)


def test_steps_are_an_end(tmp_path):
    run = fit(tmp_path, task(schedule=CosineLR, interval="step"), max_epochs=-1, max_steps=5)
    assert run.lr_scheduler_configs[0].scheduler.total == 5


def test_schedule_of_a_metric_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        fit(tmp_path, task(schedule=ReduceLROnPlateau), max_epochs=1)


def interrupted(tmp_path, schedule):
    run = fit(tmp_path, task(schedule=schedule), max_epochs=2)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    return run, tmp_path / "a.ckpt"


def test_unchanged_configuration_leaves_the_resumed_state_alone(tmp_path):
    before, path = interrupted(tmp_path, lambda o: StepLR(o, 1, gamma=0.3))
    run = fit(tmp_path, task(schedule=lambda o: StepLR(o, 1, gamma=0.3)), path, max_epochs=3, limit_train_batches=0)
    assert rate(run) == rate(before)


def test_configured_rate_wins_over_the_checkpoint(tmp_path):
    _, path = interrupted(tmp_path, lambda o: StepLR(o, 1, gamma=0.5))
    changed = task(lr=0.8, weight_decay=0.1, schedule=lambda o: StepLR(o, 1, gamma=0.5))
    run = fit(tmp_path, changed, path, max_epochs=3)
    group = run.optimizers[0].param_groups[0]
    assert group["lr"] == pytest.approx(0.8 * 0.5**3)
    assert group["weight_decay"] == 0.1


def test_configured_rate_wins_without_a_schedule(tmp_path):
    _, path = interrupted(tmp_path, None)
    assert rate(fit(tmp_path, task(lr=0.9), path, max_epochs=3)) == pytest.approx(0.9)


@pytest.mark.parametrize(
    "schedule", [lambda o: CosineLR(o), lambda o: CosineAnnealingLR(o, T_max=4)], ids=["ours", "torch"]
)
def test_configured_length_wins_over_the_checkpoint(tmp_path, schedule):
    short = (lambda o: CosineLR(o, total=2)) if schedule(SGD([torch.zeros(1)], 1)).__class__ is CosineLR else None
    _, path = interrupted(tmp_path, short or (lambda o: CosineAnnealingLR(o, T_max=3)))
    seen = []

    class Spy(ClassificationTask):
        def on_train_epoch_start(self):
            seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    spy = Spy(TinyNet(3), 0.0, lambda p: SGD(p, lr=0.4), schedule)
    run = fit(tmp_path, spy, path, max_epochs=4)
    scheduler = run.lr_scheduler_configs[0].scheduler
    if isinstance(scheduler, CosineLR):
        assert scheduler.total == 4
        assert seen == pytest.approx([0.2, 0.4 * (1 - 2**-0.5) / 2])  # epochs 2 and 3 of 4
    else:
        assert scheduler.T_max == 4


def test_schedule_taken_away_leaves_the_configured_rate(tmp_path):
    _, path = interrupted(tmp_path, lambda o: StepLR(o, 1, gamma=0.5))
    assert rate(fit(tmp_path, task(), path, max_epochs=3)) == 0.4
