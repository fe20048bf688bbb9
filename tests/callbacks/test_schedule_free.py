import pytest
import standins
import torch
from standins import RandomData, TinyNet

from knlightning.callbacks import AtomicCheckpointIO, LastCheckpoint, ScheduleFree
from knlightning.tasks import ClassificationTask


class Averaging(torch.optim.SGD):
    """In the form of a schedule-free optimizer: `eval` shows weights that are not those that are trained."""

    shown = 0.25

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def _switch(self, train_mode, factor):
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                for parameter in group["params"]:
                    parameter.mul_(factor)  # by a power of two, exactly
                group["train_mode"] = train_mode

    def train(self):
        self._switch(True, 1 / self.shown)

    def eval(self):
        self._switch(False, self.shown)

    def step(self, closure=None):
        assert self.param_groups[0]["train_mode"]
        return super().step(closure)


class Watched(ClassificationTask):
    modes = ()

    def validation_step(self, batch, batch_idx):
        self.modes = (*self.modes, self.optimizers().param_groups[0].get("train_mode"))
        return super().validation_step(batch, batch_idx)


def fit(folder, epochs, optimizer=Averaging, ckpt_path=None):
    torch.manual_seed(0)
    task = Watched(TinyNet(3, dropout_p=0.0), optimizer=lambda params: optimizer(params, lr=0.1))
    run = standins.trainer(
        folder,
        ScheduleFree(),
        LastCheckpoint(),
        plugins=[AtomicCheckpointIO()],
        max_epochs=epochs,
        enable_checkpointing=True,
    )
    run.fit(task, RandomData(), ckpt_path=ckpt_path)
    return task, torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_averaged_weights_are_evaluated_and_stored_and_a_resumed_run_is_the_same(tmp_path):
    task, stored = fit(tmp_path / "a", 2)
    assert task.modes[0]  # the sanity check, before there is an average
    assert not any(task.modes[-3:])
    assert not stored["optimizer_states"][0]["param_groups"][0]["train_mode"]
    plain, _ = fit(tmp_path / "b", 1)
    assert not torch.equal(plain.backbone.head.bias, task.backbone.head.bias)
    resumed, again = fit(tmp_path / "b", 2, ckpt_path=tmp_path / "b" / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(again["state_dict"], stored["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(dict(resumed.state_dict()), dict(stored["state_dict"]), rtol=0, atol=0)


def test_other_optimizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer must be schedule-free, such as .*AdamWScheduleFree, got 'SGD'"):
        fit(tmp_path, 1, torch.optim.SGD)
