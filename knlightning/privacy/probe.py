"""Trial steps that find out whether the samples of a batch are independent of each other, as DP-SGD needs them.

The bound on what a sample changes holds only if its gradient depends on that sample alone. Normalization over the
batch, mixed images, or a loss that is divided by something that all samples share break this without any error. So
training steps are taken in pairs on a copy of the task: with sample 0 replaced, or with the last sample left out,
nothing of the other samples may move.

The copy has disturbed weights, for layers that start at zero let no gradient through. The pixels are random; the labels
are made up, of all classes and of none. If a step draws random numbers, many seeds are tried: mixing that happens
with a probability of 0.3 passes unseen once in a thousand times, and rarer mixing more often.
"""

import copy
import random
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from knlightning.internals.lightning import prepared_batch
from knlightning.nn.normalization import PRIVATE_NORMS
from knlightning.privacy.batches import images_of, loss_of, map_tensors
from knlightning.privacy.global_random import RepeatedDraws, seeded_generators
from knlightning.privacy.loader import PrivateLoader
from knlightning.privacy.loss import Loss, labels_of
from knlightning.privacy.made_up import random_images, trial_pair
from knlightning.privacy.per_sample import PerSampleGradients
from knlightning.privacy.precision import full_float32
from knlightning.privacy.rules import LossReduction

RELATIVE = 1e-5
"""Differences up to this fraction of the largest value are taken for rounding."""
RELATIVE_OF_SIZES = 1e-4
"""The same between batches of different sizes, for which torch may choose other algorithms."""
PROBED = 4
"""Number of samples in a trial step."""
TRIALS = 12
"""Number of pairs of trial steps, each with other labels."""
RANDOM_TRIALS = 20
"""The same for a task that draws random numbers, each with other ones."""
KNOWN_TRIALS = 3
"""The same for a task of this package around layers of known packages: its loss is a mean over samples as written."""
KNOWN_PACKAGES = ("knlightning", "torch", "torchmetrics", "torchvision")


def check_by_trial(trainer: Trainer, task: LightningModule, loader: PrivateLoader) -> Loss:
    """Take trial steps with a few samples, whose pixels are random: they tell nothing of the real ones.

    Args:
        trainer: In `fit`.
        task: In training, attached to its trainer; left as it is.
        loader: The training loader.

    Returns:
        What was found out of the loss.

    Raises:
        ValueError: If samples are mixed, the gradients of samples are wrong, or the loss is neither a mean nor a sum.
    """
    samples = [number % loader.num_samples for number in range(PROBED)]
    batch = prepared_batch(trainer, task, loader.batch_of(samples))
    batch = random_images(map_tensors(batch, lambda part: part[:PROBED]))
    ignored_labels = check_independence(task, batch)
    check_gradients(task, batch)
    return Loss(loss_reduction(task, batch), ignored_labels)


def check_independence(task: LightningModule, batch: Any) -> frozenset[int]:
    """Check that no sample of a batch has a part in what becomes of another one.

    Args:
        task: In training, attached to its trainer; left as it is.
        batch: Of a training step, of a few samples; its first tensor holds the images.

    Returns:
        Labels of whole samples that the loss leaves out of its mean. Common losses do so with one that hardly any data
        have, so this is no reason to refuse them.

    Raises:
        ValueError: If outputs, gradients or buffers move with another sample; the message names the first module. If no
            gradient arrives at any layer, so that nothing can be said.
    """
    arrived, num_classes, draws = False, 2, True
    dense = any(labels.dim() > 1 for labels in labels_of(batch))
    left_out: set[int] = set()
    known = all(type(module).__module__.partition(".")[0] in KNOWN_PACKAGES for module in task.modules())
    trial = _disturbed_copy(task)
    for number in range(RANDOM_TRIALS):
        if number >= (KNOWN_TRIALS if known else RANDOM_TRIALS if draws else TRIALS):
            break
        one, two, ignored = _trial_steps(task, trial, batch, number, num_classes)
        _check_outputs(one, two, "replacing sample 0", RELATIVE)
        for name, before in one.buffers.items():
            if not torch.equal(before, two.buffers[name]):
                raise ValueError(
                    f"{name} is a buffer that training samples change, and it is stored without noise: a private"
                    " network must not have such buffers"
                )
        try:
            _check_gradients_of_outputs(one, two)
        except ValueError:
            if ignored is None or dense:
                raise
            left_out.add(ignored)
        arrived = arrived or any(bool(gradient.any()) for gradient in one.gradients.values())
        if number == 0:
            num_classes, draws = max(2, one.width), one.random
    if not arrived:
        raise ValueError(
            "no gradient arrives at any layer in a trial step, so it cannot be seen whether the loss treats each sample"
            " by itself, which private training needs: let training_step return a loss that depends on the parameters"
        )
    return frozenset(left_out)


def _trial_steps(
    task: LightningModule, trial: LightningModule, batch: Any, number: int, num_classes: int
) -> tuple["_Observation", "_Observation", int | None]:
    """Take a pair of steps with made-up labels; with those of the batch if the loss does not know these.

    Returns:
        What was seen in each, and the label that is to be ignored, if there is one.
    """
    pair, ignored = trial_pair(batch, number, num_classes, task)
    with suppress(Exception) if number else nullcontext():
        where = trial
        if ignored is not None and task.device.type != "cpu":
            # elsewhere, a label that the loss does not know would end the process
            where = _disturbed_copy(task).cpu()
            pair = map_tensors(pair, Tensor.cpu)
        one, two = (_observed(task, where, given, number) for given in pair)
        return one, two, ignored
    pair, _ = trial_pair(batch, 0, num_classes, task)
    one, two = (_observed(task, trial, given, number) for given in pair)
    return one, two, None


def _check_outputs(one: "_Observation", two: "_Observation", what: str, tolerance: float) -> None:
    for name, kind, first, second in zip(one.names, one.kinds, one.outputs, two.outputs, strict=False):
        if (moved := _largest_move(first[: len(second)], second, tolerance)) is not None:
            sample, by = moved
            norms = "" if "Norm" not in kind else f"; use norm {', '.join(PRIVATE_NORMS)}"
            raise ValueError(
                f"{name} ({kind}) does not treat each sample by itself, which private training needs: {what}"
                f" of a batch changed sample {sample} there by {by:.2g}{norms}"
            )


def _check_gradients_of_outputs(one: "_Observation", two: "_Observation") -> None:
    for number, gradient in one.gradients.items():  # that of the loss first
        if number in two.gradients and (moved := _largest_move(gradient, two.gradients[number], RELATIVE)) is not None:
            sample, by = moved
            raise ValueError(
                "the loss does not treat each sample by itself, which private training needs: replacing sample 0 of a"
                f" batch changed the gradient at sample {sample} by {by:.2g} of the largest, at the output of"
                f" {one.names[number]}. Leave out mixup and cutmix, class weights and an ignore_index with a mean over"
                " the batch, and take the mean of each sample first"
            )


def loss_reduction(task: LightningModule, batch: Any) -> LossReduction:
    """Leave out the last sample of a batch, and find out whether the loss is the mean or the sum over the samples.

    Steps differ in their number of samples. All others keep the random numbers that they had.

    Args:
        task: As in `check_independence`.
        batch: As there.

    Raises:
        ValueError: If it is neither, or the outputs of other samples move.
    """
    fewer, last = map_tensors(batch, lambda part: part[:-1]), len(images_of(batch)) - 1
    if last < 2:  # others could not be read
        return "mean"
    trial = _disturbed_copy(task)
    for seed in range(KNOWN_TRIALS):
        draws = RepeatedDraws()
        with draws.noted():
            whole = _observed(task, trial, batch, seed, precise=True)
        with draws.repeated():
            part = _observed(task, trial, fewer, seed, precise=True)
        _check_outputs(whole, part, f"leaving out sample {last}", RELATIVE_OF_SIZES)
    number = next((number for number in whole.gradients if number in part.gradients), None)
    before, after = (0.0 if number is None else float(seen.gradients[number][0].norm()) for seen in (whole, part))
    if min(before, after) == 0.0 or abs(after / before - (last + 1) / last) < 0.01:
        return "mean"
    if abs(after / before - 1) < 0.01:
        return "sum"
    raise ValueError(
        f"the loss is neither the mean nor the sum over the samples of a batch: with {last} samples in place of"
        f" {last + 1} the gradient of one of them became {after / before:.3g} times as large. Let training_step return"
        " their mean"
    )


@full_float32()  # with TF32 the two would differ by nearly what is allowed
def check_gradients(task: LightningModule, batch: Any) -> None:
    """Check that the gradients of the samples add up to the gradient of their batch, and that each is of its sample.

    Args:
        task: As in `check_independence`.
        batch: As there.

    Raises:
        ValueError: If they do not, or move with another sample; the message names the first parameter.
    """
    (batch, other), _ = trial_pair(batch, 0, 2, task)
    by_samples, of_batch = _gradients(task, batch, 1.0), _gradients(task, batch, None)
    scale = max(float(gradient.abs().max()) for gradient in by_samples.values())
    for name, gradient in of_batch.items():
        if not torch.allclose(gradient, by_samples[name].to(gradient.dtype), rtol=1e-3, atol=1e-3 * scale):
            raise ValueError(
                f"the gradients of single samples at {name} do not add up to that of the batch: it is used in a way"
                " that hooks of its layer do not see, so its samples cannot be clipped; freeze it, or call the layer"
            )
    without = _gradients(task, batch, 0.0), _gradients(task, other, 0.0)
    for name, gradient in without[0].items():
        if not torch.allclose(gradient, without[1][name], rtol=1e-3, atol=1e-3 * float(gradient.abs().max())):
            raise ValueError(
                f"the gradients of single samples at {name} move with another sample: what it is made into has a row"
                " for each sample and is shared by all. Let it meet the samples themselves, or freeze it"
            )


def _gradients(task: LightningModule, batch: Any, weight: float | None) -> dict[str, Tensor]:
    """Take a training step on a copy; sum the gradients of samples, sample 0 with a weight, or all at once if None."""
    trial = _disturbed_copy(task)
    with seeded_generators(0, task.device), torch.enable_grad():
        gradients = PerSampleGradients(trial, "sum")
        if weight is not None:
            gradients.attach()
        trial.backward(loss_of(trial.training_step(batch, 0)))
        if weight is not None:
            weights = torch.ones_like(gradients.norms())
            weights[0] = weight
            gradients.accumulate(weights, "grad")
            gradients.detach()
        return {name: p.grad for name, p in trial.named_parameters() if p.grad is not None}


class _Observation:
    """What happened in a trial step; outputs by their order in the forward pass."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.names: list[str] = []
        self.kinds: list[str] = []
        self.outputs: list[Tensor] = []  # of the samples but the first
        self.gradients: dict[int, Tensor] = {}  # at the outputs, by their numbers, the last one first
        self.buffers: dict[str, Tensor] = {}
        self.width = 0  # of the last output: the number of classes
        self.random = False  # whether random numbers were drawn

    def others(self, rows: Tensor) -> Tensor:
        """Copy what belongs to the samples but the first; a sample may have several rows behind each other."""
        each = rows.unflatten(0, (self.samples, -1)) if len(rows) % self.samples == 0 else rows
        return each[1:].detach().clone()


@full_float32()
def _observed(
    task: LightningModule, trial: LightningModule, batch: Any, seed: int, precise: bool = False
) -> _Observation:
    """Take a training step on a copy, without an optimizer, and set its buffers back; precise without autocast."""
    seen = _Observation(len(images_of(batch)))
    trial.train()
    before = {name: buffer.clone() for name, buffer in trial.named_buffers()}
    handles = []
    for name, module in trial.named_modules():
        if not any(module.children()):
            handles.append(module.register_forward_hook(_watching(seen, name)))
    try:
        with seeded_generators(seed, task.device), torch.enable_grad():
            states = _generator_states(task.device)
            with nullcontext() if precise else task.trainer.precision_plugin.train_step_context():
                loss = loss_of(trial.training_step(map_tensors(batch, Tensor.clone), 0))
            if loss.requires_grad:
                trial.backward(loss)
            seen.random = states != _generator_states(task.device)
    finally:
        for handle in handles:
            handle.remove()
        trial.zero_grad()
    for name, buffer in trial.named_buffers():
        seen.buffers[name] = buffer.clone()
        buffer.detach().copy_(before[name])
    return seen


def _generator_states(device: torch.device) -> list[Any]:
    _, keys, place, *_ = np.random.get_state(legacy=True)
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [random.getstate(), np.asarray(keys).tobytes(), place, *(state.numpy().tobytes() for state in states)]


def _disturbed_copy(task: LightningModule) -> LightningModule:
    """Copy a task but for its trainer, with its log silenced and its weights disturbed."""
    trainer = task.trainer
    trial = copy.deepcopy(task, {id(trainer): trainer})  # it holds the data
    trial.trainer = trainer
    for name in ("log", "log_dict"):
        setattr(trial, name, lambda *args, **kwargs: None)
    setattr(trial, "stop_at_nonfinite", False)  # noqa: B010 # only the package's own tasks have it
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trial.parameters():
            if parameter.is_floating_point() and parameter.numel():
                size = 0.1 * float(parameter.float().square().mean().sqrt())
                size += 0.1 / (parameter[0].numel() if parameter.dim() > 1 else 1) ** 0.5
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return trial


def _watching(seen: _Observation, name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 0 and len(output) > 1 and output.is_floating_point():
            number = len(seen.names)
            seen.names.append(name)
            seen.kinds.append(type(module).__name__)
            seen.outputs.append(seen.others(output))
            seen.width = output.shape[1] if output.dim() > 1 else 1
            if output.requires_grad:
                output.register_hook(partial(_note_gradient, seen, number))

    return hook


def _note_gradient(seen: _Observation, number: int, gradient: Tensor) -> None:
    seen.gradients[number] = seen.others(gradient)


def _largest_move(one: Tensor, two: Tensor, tolerance: float) -> tuple[int, float] | None:
    """Return which sample moved most and how far, relative to the largest value; None if none did."""
    if one.shape != two.shape:
        return None
    one, two = one.float(), two.float()
    same = (one == two) | (one.isnan() & two.isnan())
    moves = (one - two).abs().masked_fill(same, 0.0).flatten(1).amax(1)
    scale = max(float(one[one.isfinite()].abs().max()) if bool(one.isfinite().any()) else 0.0, 1e-12)
    most = int(moves.argmax())  # also of one that is not a number
    by = float(moves[most]) / scale
    return None if by <= tolerance else (most + 1, by)
