"""The training step of a private run, and what is checked in each: the optimizers' parameters, and the weights."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from knlightning.internals.lightning import num_batches_started, overridden
from knlightning.privacy.batches import count_samples, loss_of
from knlightning.privacy.clipping import ClippedSum
from knlightning.privacy.global_random import seeded_generators
from knlightning.privacy.loader import PrivateLoader
from knlightning.privacy.loss import Loss, labels_of
from knlightning.privacy.private_metrics import PrivateMetrics
from knlightning.privacy.probe import check_by_trial
from knlightning.privacy.randomness import SecretRandom


class PrivateStep:
    """Take the training steps of a task in private, and follow which of its parameters are trained.

    Args:
        trainer: In `fit`.
        task: The task that is trained.
        loader: The training loader.
        random: Where the seeds of the steps come from.
        make_sums: Begins to watch the task.
        check: Whether trial steps are taken before the first step, and where parameters were frozen or unfrozen.
        metrics: Collects values with noise; None for none.

    Attributes:
        sums: The clipped sum of the step; there is one after `watch`.
    """

    sums: ClippedSum

    def __init__(
        self,
        trainer: Trainer,
        task: LightningModule,
        loader: PrivateLoader,
        random: SecretRandom,
        make_sums: Callable[[LightningModule], ClippedSum],
        check: bool,
        metrics: PrivateMetrics | None = None,
    ) -> None:
        self.trainer, self.task, self.loader, self.random = trainer, task, loader, random
        self.make_sums, self.check, self.metrics = make_sums, check, metrics
        self._correct: Tensor | None = None
        self._loss = Loss()
        self._num_samples = self._num_batches = 0
        self._watching = ExitStack()

    def watch(self) -> None:
        """Watch the parameters that are trainable now.

        Raises:
            ValueError: If the network or its loss mix samples, or an optimizer holds other parameters too.
        """
        self.close()
        if self.check:
            self._loss = check_by_trial(self.trainer, self.task, self.loader)
        self.sums = self.make_sums(self.task)
        self._watching.callback(self.sums.close)
        training_step = partial(self._training_step, self.task.training_step)
        self._watching.enter_context(overridden(self.task, "training_step", training_step))
        check_optimizers(self.trainer, self.task, self.sums.parameters)

    def follow_freezing(self) -> None:
        """Watch other parameters where some were frozen or unfrozen since the last step.

        Raises:
            ValueError: If this was in the middle of a step, or `watch` raises it.
        """
        trainable = [parameter for parameter in self.task.parameters() if parameter.requires_grad]
        if list(map(id, trainable)) != list(map(id, self.sums.parameters)):
            if self._num_batches:
                raise ValueError("privacy: parameters were frozen or unfrozen within a step: do it between two steps")
            self.watch()

    def seed(self, purpose: str) -> int:
        """Make the secret seed of what is drawn at random for a batch, such as dropout.

        The random numbers are independent of one another, and nobody knows them. So it does not matter that a sample
        more or less moves the others to other places of the batch. With known ones it would.

        Args:
            purpose: What they are for.
        """
        trainer = self.trainer
        batch = num_batches_started(trainer) % self.loader.micro_batches
        return self.random.seed(f"{purpose}, batch {batch} of rank {trainer.global_rank}", trainer.global_step)

    def _training_step(self, original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Count the samples of a micro-batch, and let an empty one cost nothing and change nothing."""
        self._num_samples = count_samples(batch, self.loader.views)
        if not self._num_samples:
            return torch.zeros((), device=self.task.device, requires_grad=True)
        self._loss.check_labels(batch)
        watching: AbstractContextManager[list[Any]] = self.metrics.watching() if self.metrics else nullcontext([])
        with seeded_generators(self.seed("training_step"), self.task.device), watching as outputs:
            result = original(batch, *args, **kwargs)
        if self.metrics:
            self._correct = self.metrics.correct(outputs, labels_of(batch), self.loader.views)
        loss_of(result)  # there must be one
        return result

    def add(self) -> None:
        """Clip what each sample of a micro-batch contributes, and add it up; after its backward pass."""
        num_samples, self._num_samples = self._num_samples, 0
        self._num_batches += 1
        if num_samples:
            scale = self.loader.micro_batches * (num_samples if self._loss.reduction == "mean" else 1.0)
            self.sums.add(scale, num_samples, self._correct)

    def finish(self, gradient: Tensor) -> None:
        """Give the optimizer the noisy gradient.

        Args:
            gradient: For the parameters of `sums` in their order.

        Raises:
            RuntimeError: If the step has more or fewer micro-batches than it should.
            ValueError: If an optimizer holds other parameters too.
        """
        if self._num_batches != self.loader.micro_batches:  # a sample may be in each step, with up to the bound
            raise RuntimeError(
                f"privacy: a step was taken after {self._num_batches} micro-batches, and each has"
                f" {self.loader.micro_batches}: leave the trainer's accumulate_grad_batches as it is"
            )
        released = self.sums.set_gradients(gradient)
        if self.metrics:
            self.metrics.add(released)
        check_optimizers(self.trainer, self.task, self.sums.parameters)
        self._num_batches = 0

    def begin(self) -> None:
        """Forget a step that was left unfinished: the samples of the one that takes its place are drawn anew."""
        self.sums.pop()
        self._num_samples = self._num_batches = 0

    def close(self) -> None:
        """Leave the task as it was."""
        self._watching.close()


def check_optimizers(trainer: Trainer, task: LightningModule, watched: Iterable[nn.Parameter]) -> None:
    """Check that the optimizers move nothing but the parameters whose gradients are clipped and noised.

    Args:
        trainer: In `fit`, with its optimizers.
        task: The task that is trained.
        watched: The parameters whose gradients of single samples are clipped.

    Raises:
        ValueError: If an optimizer holds another one that is trainable, or has a gradient.
    """
    numbers = {id(parameter) for parameter in watched}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in numbers and (parameter.requires_grad or parameter.grad is not None):
                    names = [name for name, one in task.named_parameters() if one is parameter]
                    shape = tuple(parameter.shape)
                    where = names[0] if names else f"a parameter of the shape {shape} that is not one of the task"
                    raise ValueError(
                        f"an optimizer holds {where}, whose gradient is neither clipped nor noised: keep every"
                        " trainable parameter in a module of the task, and freeze or unfreeze it between two steps"
                    )


def check_weights(parameters: Iterable[nn.Parameter], step: int) -> None:
    """Check that the weights are finite after a step. They are private, so that to stop tells of no sample.

    Args:
        parameters: The trainable parameters.
        step: Number of the step.

    Raises:
        FloatingPointError: If they are not.
    """
    if not torch.nn.utils.get_total_norm([parameter.detach() for parameter in parameters]).isfinite():
        raise FloatingPointError(
            f"privacy: the weights are not finite after step {step}, and no sample contributes to what follows. Try a"
            " lower learning rate of the optimizer, or check that the images themselves are finite"
        )
