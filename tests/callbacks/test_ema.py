import copy

import pytest
import torch
from lightning.pytorch import Callback
from standins import Interrupt, RandomData, TinyNet, tiny_config, trainer, weights, write_config
from torch import nn
from torch.optim import SGD

from knlightning.callbacks import EMA, AtomicCheckpointIO, LastCheckpoint
from knlightning.commands import main as commands
from knlightning.tasks import ClassificationTask


class Record(Callback):
    """Keeps the weights after every batch, and those that are evaluated."""

    def __init__(self):
        self.trained, self.evaluated = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained.append(copy.deepcopy(pl_module.state_dict()))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0 and not trainer.sanity_checking:
            self.evaluated.append(copy.deepcopy(pl_module.state_dict()))


class Normalized(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 3))


def fit(root, ema, *callbacks, network=None, ckpt_path=None, **kwargs):
    """Train on 10 images in batches of 4: 3 steps an epoch."""
    torch.manual_seed(0)
    task = ClassificationTask(network or TinyNet(3, dropout_p=0.0), optimizer=lambda p: SGD(p, lr=0.5))
    writing = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True}
    run = trainer(root, ema, *callbacks, LastCheckpoint(every_n_steps=1), **writing, **kwargs)
    run.fit(task, RandomData(), ckpt_path=ckpt_path)
    return run


def average(states, decay, every):
    """The average by its definition, over the states after each step."""
    result = None
    for state in states[::every]:
        state = {name: tensor.double() for name, tensor in state.items()}
        result = state if result is None else {k: decay * result[k] + (1 - decay) * state[k] for k in state}
    return result


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(state[name].double(), expected[name].double(), rtol=1e-5, atol=1e-6)


def stored(root):
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("every", [1, 2])
def test_average_is_evaluated_and_stored_and_the_weights_go_on(tmp_path, every):
    plain, record = Record(), Record()
    fit(tmp_path / "plain", plain, max_epochs=3)
    run = fit(tmp_path / "ema", EMA(decay=0.6, every_n_steps=every), record, max_epochs=3)
    for state, expected in zip(record.trained, plain.trained, strict=True):  # training does not see the average
        assert_equal(state, expected)
    for epoch, state in enumerate(record.evaluated, start=1):
        assert_equal(state, average(plain.trained[: 3 * epoch], 0.6, every))
    checkpoint = stored(tmp_path / "ema")
    assert_equal(checkpoint["state_dict"], average(plain.trained, 0.6, every))
    assert_equal(checkpoint["current_model_state"], plain.trained[-1])
    assert_equal(run.lightning_module.state_dict(), checkpoint["state_dict"])  # so ends the run, too
    with pytest.raises(AssertionError):  # else little would be shown
        assert_equal(average(plain.trained, 0.6, every), plain.trained[-1])


def test_statistics_of_batch_normalization_are_averaged_too(tmp_path):
    record = Record()
    fit(tmp_path, EMA(decay=0.5), record, network=Normalized(), max_epochs=2)
    state = {k: v for k, v in stored(tmp_path)["state_dict"].items() if "num_batches" not in k}
    expected = {k: v for k, v in average(record.trained, 0.5, 1).items() if k in state}
    assert "backbone.1.running_var" in state
    assert_equal(state, expected)


def test_before_the_first_update_the_weights_themselves_are_evaluated_and_stored(tmp_path):
    record = Record()
    run = fit(tmp_path, EMA(decay=0.6, start_epoch=2), record, max_epochs=2)
    assert_equal(record.evaluated[0], record.trained[2])
    assert_equal(record.evaluated[1], record.trained[5])
    assert_equal(stored(tmp_path)["state_dict"], record.trained[5])
    assert_equal(run.lightning_module.state_dict(), record.trained[5])
    record = Record()
    fit(tmp_path, EMA(decay=0.6, start_epoch=2), record, max_epochs=3, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert_equal(stored(tmp_path)["state_dict"], average(record.trained, 0.6, 1))  # of the third epoch alone


@pytest.mark.parametrize("start_epoch", [0, 1])
@pytest.mark.parametrize("step", [3, 6])
def test_resumed_average_equals_that_of_the_whole_run(tmp_path, step, start_epoch):
    def ema():
        return EMA(decay=0.6, every_n_steps=2, start_epoch=start_epoch)

    fit(tmp_path / "whole", ema(), max_epochs=3)
    with pytest.raises(SystemExit):
        fit(tmp_path / "parts", ema(), Interrupt(step), max_epochs=3)
    assert stored(tmp_path / "parts")["global_step"] == step
    path = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "parts", ema(), max_epochs=3, ckpt_path=path)
    one, other = stored(tmp_path / "parts"), stored(tmp_path / "whole")
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def test_evaluation_in_the_process_of_the_training_takes_the_average_of_the_checkpoint(tmp_path):
    record = Record()
    run = fit(tmp_path, EMA(decay=0.6), record, max_epochs=2)
    with torch.no_grad():
        run.lightning_module.backbone.head.weight.zero_()
    path = tmp_path / "checkpoints" / "last.ckpt"
    run.validate(run.lightning_module, RandomData(), ckpt_path=path, verbose=False, weights_only=True)
    assert_equal(record.evaluated[-1], stored(tmp_path)["state_dict"])


def test_command_line_evaluates_what_fit_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ema = {"class_path": "knlightning.callbacks.EMA", "init_args": {"decay": 0.9, "every_n_steps": 2}}
    few = {"limit_train_batches": 8, "limit_val_batches": 1, "limit_test_batches": 1}  # validation data are the same
    write_config(tmp_path / "tiny.yaml", tiny_config(max_epochs=2, callbacks=[ema], **few))
    reported = commands.run(["fit", "--config", "tiny.yaml"]).trainer.callback_metrics["val/acc"]
    best = tmp_path / "runs" / "tiny" / "0" / "checkpoints" / "best.ckpt"
    cli = commands.run(["test", "--config", "tiny.yaml", "--ckpt_path", "best"])
    assert cli.trainer.callback_metrics["test/acc"] == reported  # the best is that of the last epoch
    assert_equal(cli.model.state_dict(), weights(best))
    trained = torch.load(best, weights_only=True)["current_model_state"]["backbone.head.weight"]
    assert not torch.equal(weights(best)["backbone.head.weight"], trained)
    commands.main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "3"])
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [{"decay": 1.0}, {"decay": -0.1}, {"every_n_steps": 0}, {"start_epoch": -1}])
def test_arguments_out_of_range(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"^{name} must be"):
        EMA(**arguments)
