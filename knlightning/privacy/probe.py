"""Trial steps that find out whether the samples of a batch are independent of each other, as DP-SGD needs them.

The bound on what a sample changes holds only if its gradient depends on that sample alone. Normalization over the
batch, mixed images, or a loss that is divided by something that all samples share break this without any error. So a
training step is taken twice on a copy of the task: with sample 0 replaced, nothing of the other samples may move.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from knlightning.internals.lightning import prepared_batch
from knlightning.nn.normalization import PRIVATE_NORMS
from knlightning.privacy.batches import images_of, loss_of, map_tensors
from knlightning.privacy.loader import PrivateLoader
from knlightning.privacy.per_sample import PerSampleGradients
from knlightning.privacy.precision import full_float32
from knlightning.privacy.rules import LossReduction

RELATIVE = 1e-5
"""Differences up to this fraction of the largest value are taken for rounding."""
PROBED = 4
"""Number of samples in a trial step."""


def check_by_trial(trainer: Trainer, task: LightningModule, loader: PrivateLoader) -> LossReduction:
    """Take trial steps with a few samples, whose pixels are random: they tell nothing of the real ones.

    Args:
        trainer: In `fit`.
        task: In training, attached to its trainer; left as it is.
        loader: The training loader.

    Returns:
        Whether the loss of the task is the mean or the sum over the samples of a batch.

    Raises:
        ValueError: If samples are mixed, the gradients of samples are wrong, or the loss is neither a mean nor a sum.
    """
    batch = prepared_batch(trainer, task, loader.batch_of(range(min(PROBED, loader.num_samples))))
    generator = torch.Generator().manual_seed(0)

    def random_pixels(part: Tensor) -> Tensor:
        return torch.rand(part.shape, generator=generator).to(part) if part.is_floating_point() else part

    batch = map_tensors(batch, random_pixels)
    check_independence(task, batch)
    check_gradients(task, batch)
    return loss_reduction(task, batch)


def check_independence(task: LightningModule, batch: Any) -> None:
    """Check that no sample of a batch has a part in what becomes of another one.

    Args:
        task: In training, attached to its trainer; left as it is.
        batch: Of a training step, of a few samples; its first tensor holds the images.

    Raises:
        ValueError: If outputs, gradients or buffers move with another sample; the message names the first module.
    """
    other = _with_another_first(batch)
    one, two = (_observed(task, given) for given in (batch, other))
    for name, kind, first, second in zip(one.names, one.kinds, one.outputs, two.outputs, strict=False):
        if (moved := _largest_move(first, second)) is not None:
            sample, by = moved
            norms = "" if "Norm" not in kind else f"; use norm {', '.join(PRIVATE_NORMS)}"
            raise ValueError(
                f"{name} ({kind}) does not treat each sample by itself, which private training needs: replacing"
                f" sample 0 of a batch changed sample {sample} there by {by:.2g}{norms}"
            )
    for name, before in one.buffers.items():
        if not torch.equal(before, two.buffers[name]):
            raise ValueError(
                f"{name} is a buffer that training samples change, and it is stored without noise: a private network"
                " must not have such buffers"
            )
    if (moved := _largest_move(one.gradient, two.gradient)) is not None:
        sample, by = moved
        raise ValueError(
            "the loss does not treat each sample by itself, which private training needs: replacing sample 0 of a batch"
            f" changed the gradient at sample {sample} by {by:.2g} of the largest. Leave out mixup and cutmix, and take"
            ' the mean of each sample first (for segmentation, loss_mean="image")'
        )


def loss_reduction(task: LightningModule, batch: Any) -> LossReduction:
    """Find out whether the loss of a task is the mean or the sum over the samples of a batch.

    Args:
        task: As in `check_independence`.
        batch: As there.

    Raises:
        ValueError: If it is neither.
    """
    half = map_tensors(batch, lambda part: part[: PROBED // 2])
    whole, part = (_observed(task, given, train=False).gradient for given in (batch, half))
    largest = float(whole[0].norm()), float(part[0].norm())  # of sample 1
    if min(largest) == 0.0 or abs(largest[1] / largest[0] - 2) < 0.02:
        return "mean"
    if abs(largest[1] / largest[0] - 1) < 0.02:
        return "sum"
    raise ValueError(
        "the loss is neither the mean nor the sum over the samples of a batch: with half as many samples the gradient"
        f" of one of them became {largest[1] / largest[0]:.3g} times as large. Let training_step return their mean"
    )


@full_float32()  # with TF32 the two would differ by nearly what is allowed
def check_gradients(task: LightningModule, batch: Any) -> None:
    """Check that the gradients of the samples add up to the gradient of their batch.

    Args:
        task: As in `check_independence`.
        batch: As there.

    Raises:
        ValueError: If they do not; the message names the first parameter.
    """
    sums: list[dict[str, Tensor]] = []
    for by_samples in (False, True):
        with _copied(task) as trial, torch.random.fork_rng(_devices(task)), torch.enable_grad():
            torch.manual_seed(0)
            gradients = PerSampleGradients(trial, "sum")
            if by_samples:
                gradients.attach()
            loss_of(trial.training_step(batch, 0)).backward()
            if by_samples:
                gradients.accumulate(torch.ones_like(gradients.norms()), "grad")
                gradients.detach()
            sums.append({name: p.grad for name, p in trial.named_parameters() if p.grad is not None})
    scale = max(float(gradient.abs().max()) for gradient in sums[1].values())
    for name, gradient in sums[0].items():
        if not torch.allclose(gradient, sums[1][name].to(gradient.dtype), rtol=1e-3, atol=1e-3 * scale):
            raise ValueError(
                f"the gradients of single samples at {name} do not add up to that of the batch: it is used in a way"
                " that hooks of its layer do not see, so its samples cannot be clipped; freeze it, or call the layer"
            )


class _Observation:
    def __init__(self) -> None:
        self.names: list[str] = []
        self.kinds: list[str] = []
        self.outputs: list[Tensor] = []  # of the samples but the first
        self.gradient = torch.empty(0)
        self.buffers: dict[str, Tensor] = {}


@full_float32()
def _observed(task: LightningModule, batch: Any, train: bool = True) -> _Observation:
    """Take a training step on a copy, without an optimizer."""
    seen = _Observation()
    with _copied(task) as trial, torch.random.fork_rng(_devices(task)), torch.enable_grad():
        trial.train(train)
        torch.manual_seed(0)
        for name, module in trial.named_modules():
            if not any(module.children()):
                module.register_forward_hook(_watching(seen, name))
        given_images = images_of(batch)
        images = given_images.detach().clone().requires_grad_()
        given = map_tensors(batch, lambda part: images if part is given_images else part)
        # to tell a mean from a sum takes no mixed precision, and more digits than it has
        with task.trainer.precision_plugin.train_step_context() if train else nullcontext():
            loss = loss_of(trial.training_step(given, 0))
        (gradient,) = torch.autograd.grad(loss, images, allow_unused=True)
        seen.gradient = torch.zeros_like(images[1:]) if gradient is None else gradient[1:]
        seen.buffers = {name: buffer.clone() for name, buffer in trial.named_buffers()}
    return seen


@contextmanager
def _copied(task: LightningModule) -> Iterator[LightningModule]:
    """Copy a task but for its trainer, with its log silenced."""
    trainer = task.trainer
    task.trainer = None  # it holds the data
    try:
        trial = copy.deepcopy(task)
    finally:
        task.trainer = trainer
    trial.trainer = trainer
    for name in ("log", "log_dict"):
        setattr(trial, name, _silent)
    yield trial


def _silent(*args: Any, **kwargs: Any) -> None:
    pass


def _watching(seen: _Observation, name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 0 and len(output) > 1 and output.is_floating_point():
            seen.names.append(name)
            seen.kinds.append(type(module).__name__)
            seen.outputs.append(output.detach()[1:].clone())

    return hook


def _with_another_first(batch: Any) -> Any:
    """Replace the first sample of a batch by noise of a larger spread, with the labels of the last."""
    generator = torch.Generator().manual_seed(1)

    def replaced(part: Tensor) -> Tensor:
        part = part.clone()
        if part.is_floating_point():
            part[0] = part[0] + 10 * torch.rand(part[0].shape, generator=generator).pow(4).to(part)
        else:
            part[0] = part[-1]
        return part

    return map_tensors(batch, replaced)


def _largest_move(one: Tensor, two: Tensor) -> tuple[int, float] | None:
    """Return which sample moved most and how far, relative to the largest value; None if none did."""
    if one.shape != two.shape:
        return None
    moves = (one.float() - two.float()).abs().flatten(1).amax(1)
    scale = max(float(one.float().abs().max()), 1e-12)
    most = int(moves.argmax())
    by = float(moves[most]) / scale
    return (most + 1, by) if by > RELATIVE else None


def _devices(task: LightningModule) -> list[torch.device]:
    return [task.device] if task.device.type == "cuda" else []
