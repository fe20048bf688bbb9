from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from standins import RandomData, TinyNet, assert_same_weights, finished, knl, tiny_config, trainer, write_config
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from knlightning.checkpoint_files import read_checkpoint
from knlightning.checks import ArgumentError
from knlightning.commands.main import run
from knlightning.models import knresnet8
from knlightning.tasks import ClassificationTask
from knlightning.tasks.fine_tuning import Freezing

UNUSED = ["--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true"]


class Net(nn.Module):
    """Two convolutions with batch normalization and dropout, and a parameter of the network itself."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(*(self._layers(channels) for channels in (3, 4)))
        self.shift = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(4, num_classes)

    def _layers(self, channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.ReLU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).mean((2, 3)) + self.shift)


def changed(before, after):
    """Name the parts of which a value has changed, up to the layer."""
    return {name.rpartition(".")[0] or name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        ((), {"body.0.0", "body.0.1", "body.1.0", "body.1.1", "shift", "head"}),
        ("body.0, shift", {"body.1.0", "body.1.1", "head"}),
        (["body.0.1", "body.1"], {"body.0.0", "shift", "head"}),
        ("all", {"head"}),
    ],
)
def test_frozen_parts_stay_as_they_are(tmp_path, freeze, trained):
    task = ClassificationTask(Net(3), freeze=freeze)
    before = {name: tensor.clone() for name, tensor in task.backbone.state_dict().items()}
    trainer(tmp_path, max_epochs=2).fit(task, RandomData())
    assert changed(before, task.backbone.state_dict()) == trained  # statistics of batch normalization, too


def test_everything_is_trained_from_an_epoch_on():
    net = Net()
    net.head.bias.requires_grad_(False)  # by the user
    freezing = Freezing(net, "body", 2)
    assert all(parameter.requires_grad for parameter in net.body.parameters())  # until training starts
    for epoch, frozen in ((1, True), (1, True), (2, False), (3, False)):
        freezing.apply(epoch)
        assert {parameter.requires_grad for parameter in net.body.parameters()} == {not frozen}
        assert {layer.training for layer in net.body.modules()} == {not frozen}
        assert net.training
        assert not net.head.bias.requires_grad


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"freeze: nothing .* is named tail, body\.0\.2; the network has body, head"):
        Freezing(Net(), "tail,body.0.2,head", None)
    with pytest.raises(ArgumentError, match="thaw_epoch must be a whole number at least 1, or null for never, got 0"):
        Freezing(Net(), "all", 0)
    with pytest.raises(ArgumentError, match="thaw_epoch must be null where freeze names nothing, got 3"):
        Freezing(Net(), "", 3)


def test_devices_that_wait_for_frozen_layers_are_refused(monkeypatch):
    task = ClassificationTask(Net(), freeze="all", thaw_epoch=1)
    task.trainer = trainer(None)
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    for unused in (True, False):
        nn.Module.__init__(wrapped)
        wrapped.find_unused_parameters = unused
        monkeypatch.setattr(task.trainer.strategy, "_model", wrapped)
        if unused:
            task.freezing.begin(task)
    with pytest.raises(ValueError, match="must be ddp_find_unused_parameters_true"):
        task.freezing.begin(task)


def test_weights_are_those_of_a_file(tmp_path):
    path = str(tmp_path / "a.pth")
    source = knresnet8(num_classes=10)
    torch.save(source.state_dict(), path)
    task = ClassificationTask(knresnet8(num_classes=3), init_from=path)
    assert torch.equal(task.backbone.stem[0].weight, source.stem[0].weight)
    assert task.loaded.anew == ("fc.weight", "fc.bias")
    with pytest.raises(ValueError, match="does not fit this TinyNet"):
        ClassificationTask(TinyNet(), init_from=path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with weights of 4 classes and the configuration of a run that begins with them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    torch.save(Net(4).state_dict(), "weights.pth")
    config = tiny_config(max_epochs=3, limit_train_batches=4, enable_progress_bar=True)
    config["model"]["init_args"] |= {
        "backbone": {"class_path": f"{__name__}.Net"},
        "lr_scheduler": None,
        "init_from": "weights.pth",
        "freeze": "body.0",
        "thaw_epoch": 2,
        "layer_decay": 0.5,
    }
    write_config(tmp_path / "tiny.yaml", config)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 10])  # in the middle of an epoch, before and after the thaw
def test_resumed_run_ends_as_an_uninterrupted_one(folder, step, capsys):
    run(["fit", "--config", "tiny.yaml", "--run_dir", "whole"])
    assert "Weights: 15 tensors taken; new: head.weight, head.bias" in capsys.readouterr().out
    run(["fit", "--config", "tiny.yaml", "--run_dir", "cut", "--trainer.max_steps", str(step)])
    capsys.readouterr()
    (folder / "weights.pth").unlink()
    run(["fit", "--config", "cut/config.yaml", "--ckpt_path", "last", "--run_dir", "cut", "--trainer.max_steps", "-1"])
    assert "Weights" not in capsys.readouterr().out
    whole, cut = (read_checkpoint(folder / name / "checkpoints" / "last.ckpt") for name in ("whole", "cut"))
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(cut[part], whole[part], rtol=0, atol=0)
    run(["test", "--config", "cut/config.yaml", "--ckpt_path", "last", "--run_dir", "cut"])
    assert "init_from: weights.pth" in (folder / "cut" / "config.yaml").read_text()
    task = ClassificationTask.load_from_checkpoint(folder / "cut" / "checkpoints" / "last.ckpt")
    assert changed(task.state_dict(), cut["state_dict"]) == set()


class Recorder(Callback):
    """Writes what each process holds at the start of each epoch, and at the end."""

    def on_train_epoch_start(self, trainer, task):
        name = f"{trainer.current_epoch}-{trainer.global_rank}.pt"
        torch.save({name: tensor.detach().clone() for name, tensor in task.backbone.state_dict().items()}, name)

    on_train_end = on_train_epoch_start


@pytest.mark.slow
def test_two_processes_thaw_together_and_resume(folder):
    def fit(*args):
        command = ["fit", "--config", "tiny.yaml", f"--trainer.callbacks={__name__}.Recorder", *UNUSED]
        finished(knl(*command, *args, cwd=folder))

    fit("--run_dir", "whole")
    held = [[torch.load(folder / f"{epoch}-{rank}.pt") for rank in (0, 1)] for epoch in range(4)]
    names = {name for name, _ in Net().named_parameters()}
    for first, second in held:
        assert changed(first, second) <= {"body.1.1"}  # statistics of batch normalization are those of a process
        assert all(torch.equal(first[name], second[name]) for name in names)
    trained = [changed(before, after) for (before, _), (after, _) in pairwise(held)]
    rest = {"body.1.0", "body.1.1", "shift", "head"}
    assert trained == [rest, rest, rest | {"body.0.0", "body.0.1"}]

    fit("--run_dir", "cut", "--trainer.max_steps", "6")  # in the second epoch
    fit("--run_dir", "cut", "--ckpt_path", "last")
    assert_same_weights(*(folder / run / "checkpoints" / "last.ckpt" for run in ("whole", "cut")))


def test_learning_rates_fall_with_the_depth():
    task = ClassificationTask(
        knresnet8(num_classes=3), optimizer=lambda params: SGD(params, lr=0.8), layer_decay=0.5, bias_weight_decay=0.0
    )
    names = {parameter: name.removeprefix("backbone.") for name, parameter in task.named_parameters()}
    rates = {}
    for group in task.configure_optimizers().param_groups:
        for parameter in group["params"]:
            rates.setdefault(group["lr"], set()).add(names[parameter].rpartition(".")[0])
            assert group["weight_decay"] == 0
    assert {rate: sorted(layers)[0] for rate, layers in sorted(rates.items())} == {
        0.8 / 2**6: "stem.0",
        0.8 / 2**5: "stages.0.0.conv1",
        0.8 / 2**4: "transitions.0.1",
        0.8 / 2**3: "stages.1.0.conv1",
        0.8 / 2**2: "transitions.1.1",
        0.8 / 2: "stages.2.0.conv1",
        0.8: "fc",
    }
