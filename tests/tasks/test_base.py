import inspect
from functools import partial

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning
from standins import RandomData, Stop, TinyNet, trainer
from torch import nn
from torch.optim import SGD, Adagrad, Rprop
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torchvision.models import convnext_tiny

from knlightning.models import knresnet8
from knlightning.tasks import ClassificationTask, CosineLR, PolyLR, SegmentationTask, Task
from knlightning.tasks.optimizer_settings import parameter_groups

FAST = partial(SGD, lr=0.4)


def fit(tmp_path, task, ckpt_path=None, data=None, callbacks=(), **kwargs):
    run = trainer(tmp_path, *callbacks, **kwargs)
    run.fit(task, data or RandomData(), ckpt_path=ckpt_path)
    return run


def task(lr=0.4, weight_decay=0.0, schedule=None, interval="epoch"):
    return ClassificationTask(
        TinyNet(3),
        optimizer=lambda p: SGD(p, lr=lr, weight_decay=weight_decay),
        lr_scheduler=schedule,
        lr_scheduler_interval=interval,
    )


def rate(run):
    return run.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize(("interval", "total"), [("epoch", 3), ("step", 9)])
def test_cosine_lasts_as_long_as_the_run(tmp_path, interval, total):
    run = fit(tmp_path, task(schedule=lambda o: CosineLR(o, final=0.01), interval=interval), max_epochs=3)
    assert run.lr_scheduler_configs[0].scheduler.total == total  # 10 images in batches of 4: 3 steps an epoch
    assert rate(run) == pytest.approx(0.4 * 0.01)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("accumulate", "total"), [(1, 9), (2, 6), (3, 3)])
def test_poly_by_step_lasts_as_long_as_the_run(tmp_path, precision, accumulate, total):
    seen = []

    class Spy(ClassificationTask):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    spy = Spy(TinyNet(3), optimizer=FAST, lr_scheduler=PolyLR, lr_scheduler_interval="step")
    run = fit(tmp_path, spy, max_epochs=3, accumulate_grad_batches=accumulate, precision=precision)
    assert run.global_step == run.lr_scheduler_configs[0].scheduler.total == total
    steps, taken = [], 0
    for batch in [1, 2, 3] * 3:
        taken += batch % accumulate == 0 or batch == 3  # the last batch of an epoch ends a step, too
        steps.append(taken)
    assert seen == pytest.approx([0.4 * (1 - step / total) ** 0.9 for step in steps])


def test_stated_length_stays(tmp_path):
    run = fit(tmp_path, task(schedule=lambda o: CosineLR(o, total=100)), max_epochs=1)
    assert run.lr_scheduler_configs[0].scheduler.total == 100


def test_run_without_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no end .*epoch.*max_epochs.*total of the lr_scheduler"):
        fit(tmp_path, task(schedule=CosineLR), max_epochs=-1, max_steps=5)


def test_steps_are_an_end(tmp_path):
    run = fit(tmp_path, task(schedule=CosineLR, interval="step"), max_epochs=-1, max_steps=5)
    assert run.lr_scheduler_configs[0].scheduler.total == 5


def test_schedule_of_a_metric_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        fit(tmp_path, task(schedule=ReduceLROnPlateau), max_epochs=1)


@pytest.mark.parametrize(("schedule", "expected"), [(lambda o: StepLR(o, 1, gamma=0.5), 0.8 * 0.5**3), (None, 0.8)])
def test_configured_rate_wins_over_the_checkpoint(tmp_path, schedule, expected):
    run = fit(tmp_path, task(schedule=schedule), max_epochs=2)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    run = fit(tmp_path, task(lr=0.8, weight_decay=0.1, schedule=schedule), tmp_path / "a.ckpt", max_epochs=3)
    assert rate(run) == pytest.approx(expected)
    assert run.optimizers[0].param_groups[0]["weight_decay"] == 0.1


# steps


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(("batches", "accumulate"), [(3, 8), (8, 3), (4, 2)])
def test_last_step_of_an_epoch_is_the_mean_of_its_batches(tmp_path, batches, accumulate, clip):
    data = RandomData(samples=24, batch_size=24 // batches)
    network = TinyNet(3, dropout_p=0.0)
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "max_epochs": 2}
    fit(tmp_path, ClassificationTask(network, optimizer=FAST), data=data, **options)
    reference = TinyNet(3, dropout_p=0.0)
    reference.load_state_dict(weights)
    optimizer = FAST(reference.parameters())
    for _ in range(2):
        for start in range(0, batches, accumulate):
            step = slice(start * 24 // batches, (start + accumulate) * 24 // batches)
            images, labels = (part[step] for part in data.dataset.tensors)
            optimizer.zero_grad()
            nn.functional.cross_entropy(reference(images), labels).backward()
            if clip:
                nn.utils.clip_grad_norm_(reference.parameters(), clip)
            optimizer.step()
    torch.testing.assert_close(network.state_dict(), reference.state_dict())


class StopInValidation(Callback):
    """Tells a run to stop where early stopping does; `Stop` does it where max_time does."""

    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop = not trainer.sanity_checking


@pytest.mark.parametrize(("stop", "batches"), [(Stop(1), 3), (Stop(3), 3), (Stop(7), 8), (StopInValidation(), 6)])
def test_run_that_is_told_to_stop_takes_its_step_first(tmp_path, stop, batches):
    data = RandomData(samples=24, batch_size=3)  # 8 batches: steps after 3, 6 and 8
    interval = 4 if isinstance(stop, StopInValidation) else 8
    options = {"accumulate_grad_batches": 3, "max_epochs": 2, "val_check_interval": interval}
    run = fit(tmp_path, ClassificationTask(TinyNet(3), optimizer=FAST), data=data, callbacks=[stop], **options)
    assert run.fit_loop.total_batch_idx + 1 == batches
    assert run.global_step == -(-batches // 3)


def test_single_image_and_batch_normalization_are_named(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*single image, which batch 2 is.*drop_last"):
        fit(tmp_path, ClassificationTask(network), data=RandomData(samples=9), max_epochs=1)


# arguments


@pytest.mark.parametrize("kind", [ClassificationTask, SegmentationTask])
def test_configuration_and_help_know_the_arguments_that_all_tasks_share(kind):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "task")
    text = parser.format_help()
    config = parser.get_defaults().task
    for name, parameter in inspect.signature(Task).parameters.items():
        assert f"--task.{name} " in text
        if name not in ("backbone", "optimizer"):
            assert config[name] == parameter.default
    assert "Whether the backbone is compiled" in text
    assert config.optimizer.init_args.lr == 0.05
    with pytest.raises(ArgumentError, match=r"unrecognized arguments: --task.chanels_last"):
        parser.parse_args(["--task.chanels_last=true"])


# weight decay of norms and biases


class Parts(nn.Module):
    """Has each kind of parameters."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.nested = nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm([4, 8, 8]))
        self.attention = nn.MultiheadAttention(4, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        return self.head((self.scale * self.nested(self.norm(self.conv(images)))).mean(dim=(2, 3)))


NORMS = ["norm.weight", "norm.bias", *(f"nested.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias"))]
BIASES = ["conv.bias", "attention.in_proj_bias", "attention.out_proj.bias", "head.bias"]


@pytest.mark.parametrize(
    ("norm", "bias", "expected"),
    [
        (0.0, None, {0.0: NORMS}),
        (None, 0.5, {0.5: sorted(BIASES + [name for name in NORMS if name.endswith("bias")])}),
        (0.0, 0.5, {0.0: NORMS, 0.5: BIASES}),
        (None, None, {}),
    ],
)
def test_parameters_are_parted_by_their_weight_decay(norm, bias, expected):
    model = Parts()
    names = {parameter: name for name, parameter in model.named_parameters()}
    rest, *apart = parameter_groups(model, norm, bias)
    assert {group["weight_decay"]: sorted(names[p] for p in group["params"]) for group in apart} == {
        decay: sorted(members) for decay, members in expected.items()
    }
    assert "weight_decay" not in rest
    grouped = [p for group in (rest, *apart) for p in group["params"]]
    assert len(grouped) == len(names)
    assert set(grouped) == set(names)
    order = list(names)
    assert all([p for p in order if p in set(group["params"])] == group["params"] for group in (rest, *apart))


def test_norms_of_convnext_are_its_layer_norms():
    with torch.device("meta"):
        model = convnext_tiny()
    _, norms = parameter_groups(model, 0.0, None)
    expected = [p for layer in model.modules() if isinstance(layer, nn.LayerNorm) for p in layer.parameters()]
    assert set(norms["params"]) == set(expected)
    assert len(expected) == 2 * 23


def test_kernel_normalized_networks_have_no_parameters_of_norms():
    (only,) = parameter_groups(knresnet8(num_classes=10), 0.0, None)
    assert len(only["params"]) == len(list(knresnet8(num_classes=10).parameters()))


def test_optimizer_decays_each_group_as_configured(tmp_path):
    network = Parts()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    made = ClassificationTask(
        network, optimizer=lambda p: SGD(p, lr=0.1, weight_decay=0.5), norm_weight_decay=0.0, bias_weight_decay=0.25
    )
    optimizer = made.configure_optimizers()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        decay = 0.0 if name in NORMS else 0.25 if name in BIASES else 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * decay))


def decaying(norm, bias=None, decay=0.5):
    return ClassificationTask(
        Parts(),
        optimizer=lambda p: SGD(p, lr=0.1, weight_decay=decay),
        lr_scheduler=CosineLR,
        norm_weight_decay=norm,
        bias_weight_decay=bias,
    )


def test_configured_weight_decays_win_over_the_checkpoint(tmp_path):
    run = fit(tmp_path, decaying(0.0, 0.25), max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    run = fit(tmp_path, decaying(0.125, 0.25, 0.75), tmp_path / "a.ckpt", max_epochs=2)
    assert [group["weight_decay"] for group in run.optimizers[0].param_groups] == [0.75, 0.125, 0.25]


@pytest.mark.parametrize(("norm", "bias"), [(None, None), (None, 0.25), (0.0, 0.25)])
def test_other_groups_than_those_of_the_checkpoint_are_refused(tmp_path, norm, bias):
    run = fit(tmp_path, decaying(0.0), max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    with pytest.raises(ValueError, match=r"norm_weight_decay, bias_weight_decay .* cannot be added or removed"):
        fit(tmp_path, decaying(norm, bias), tmp_path / "a.ckpt", max_epochs=2)


def test_settings_of_an_optimizer_are_finite():
    made = ClassificationTask(Parts(), optimizer=partial(SGD, lr=0.1, momentum=float("nan")))
    with pytest.raises(ValueError, match=r"^momentum must be finite in float32 for the optimizer SGD, got nan"):
        made.configure_optimizers()


@pytest.mark.parametrize(("interval", "warmup", "length"), [("epoch", 2, 2), ("step", 6, 6)])
def test_warmup_as_long_as_the_run_is_refused_before_a_step(tmp_path, interval, warmup, length):
    made = task(schedule=lambda o: CosineLR(o, warmup=warmup), interval=interval)
    with pytest.raises(ValueError, match=rf"^warmup must be below the length .* which is {length}, got {warmup}"):
        fit(tmp_path, made, max_epochs=2)
    assert made.trainer.global_step == 0
    fit(tmp_path, task(schedule=lambda o: CosineLR(o, warmup=warmup - 1), interval=interval), max_epochs=2)
    fit(tmp_path, task(schedule=lambda o: CosineLR(o, warmup=warmup), interval=interval), fast_dev_run=True)


def test_network_without_parameters_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^no parameter is trained"):
        fit(tmp_path, task(), max_epochs=1, callbacks=[BackboneFinetuning()])


def test_optimizer_without_weight_decay_is_refused():
    made = ClassificationTask(Parts(), optimizer=Rprop, norm_weight_decay=0.0)
    with pytest.raises(ValueError, match=r"^norm_weight_decay must be null for the optimizer Rprop"):
        made.configure_optimizers()
    ClassificationTask(Parts(), optimizer=Adagrad, norm_weight_decay=0.0).configure_optimizers()


# compilation


def test_compiled_network_trains_as_the_plain_one_and_keeps_its_names(tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    # the default backend takes half a minute to write, and compile, C++
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    def trained(compile):
        torch.manual_seed(0)
        made = ClassificationTask(TinyNet(3, dropout_p=0.0), compile=compile)
        fit(tmp_path, made, max_epochs=2).save_checkpoint(tmp_path / f"{compile}.ckpt")
        return torch.load(tmp_path / f"{compile}.ckpt", weights_only=True)["state_dict"]

    counters.clear()
    plain = trained(False)
    assert counters["stats"]["unique_graphs"] == 0
    compiled = trained(True)
    assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(compiled, plain)  # the names too


def test_images_too_small_for_the_network():
    task = ClassificationTask(torch.nn.Sequential(torch.nn.MaxPool2d(4), torch.nn.Flatten()))
    with pytest.raises(ValueError, match=r"^Images of 3x3 are too small for the network\. Take larger images"):
        task(torch.ones(1, 3, 3, 3))
