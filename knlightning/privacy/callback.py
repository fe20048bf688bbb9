"""Differentially private training (DP-SGD; Abadi et al., 2016) as a callback of any run."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from knlightning.privacy.accounting import (
    GDP,
    Mechanism,
    Steps,
    affordable_steps,
    epsilon,
    merged,
    noise_for,
)
from knlightning.privacy.loader import PrivateLoader, check_loader
from knlightning.privacy.per_sample import PerSampleGradients
from knlightning.privacy.probe import PROBED, check_gradients, check_independence, loss_reduction
from knlightning.privacy.randomness import SecretRandom, fresh_key, known_key
from knlightning.privacy.refusals import check_data, check_run
from knlightning.run_directory import replacing, run_of

Clipping = Literal["flat", "automatic"]

REPORT = "privacy.json"
"""Written into the run directory with every checkpoint."""
MARGIN = 1e-4
"""By how much of itself a gradient is clipped below the bound, for the rounding of its norm."""


@dataclass(frozen=True)
class Plan:
    """What a private run does at each of its steps, and how often.

    Args:
        samples: training samples.
        batch: samples in a step, on average over the steps.
        rate: probability of a sample to be in a step.
        epoch_steps: steps in an epoch.
        steps: steps of the whole run.
        noise: noise multiplier: standard deviation of the noise over the clipping bound.
        last_step: the step after which the budget is spent; `steps` if it lasts.
    """

    samples: int
    batch: int
    rate: float
    epoch_steps: int
    steps: int
    noise: float
    last_step: int


class DifferentialPrivacy(Callback):
    """Train with (epsilon, delta)-differential privacy for the training samples, by DP-SGD.

    Every step takes each training sample with the same probability, independently (Poisson sampling); bounds the
    norm of each sample's gradient; adds up; and adds Gaussian noise. What is guaranteed is that the checkpoints of the
    run, taken together, are (epsilon, delta)-differentially private with respect to adding or removing one training
    sample, whose number is taken for public. Not covered are validation and test images, by which the best
    checkpoint is chosen; the logged training loss and accuracy, which are computed without noise; and the choice of
    hyperparameters by further runs.

    Added to a run by one line, for any task whose loss is a mean (or sum) over the samples of a batch:

        trainer:
          callbacks+: {class_path: knlightning.privacy.DifferentialPrivacy, init_args: {target_epsilon: 8.0, ...}}

    A step takes `data.batch_size` samples on average, times the devices and trainer.accumulate_grad_batches. Epochs,
    steps of schedules, of the log, of trainer.limit_train_batches and of the progress bar are such steps. In
    checkpoints the weights have the same names as ever, and `privacy.json` beside them says what was spent.

    Args:
        target_epsilon: the budget. The noise is found for it, if not given; with `noise_multiplier`, training stops
            before the step that would exceed it.
        target_delta: probability with which the guarantee may fail, above 0 and below 1 / (number of samples).
        noise_multiplier: standard deviation of the noise over max_grad_norm; None to find it from the budget.
        max_grad_norm: bound on the norm of a sample's gradient, above 0.
        accountant: "prv" (tight, an upper bound), "rdp" (that of the paper) or "gdp" (understates; for comparison).
        poisson_sampling: False for batches of equal size from a shuffled set, as without privacy. What the accountant
            computes does not hold for these, and epsilon is reported as nominal.
        physical_batch_size: images (samples times views) that go through the network at once on each device, on
            average; None for as many as a step has, over trainer.accumulate_grad_batches.
        clipping: "flat" scales the gradients down whose norm is above the bound; "automatic" scales each to the
            bound, over its norm + 0.01, so that the bound is but a part of the learning rate (Bu et al., 2023).
        views: augmented views of each sample, whose gradients are averaged before they are clipped; at least 1
            (augmentation multiplicity; De et al., 2022). At 1, samples are augmented as without privacy.
        secure_mode: draw sampling and noise by a cryptographic generator, and guard the noise against attacks on
            its rounding; see :class:`knlightning.privacy.randomness.SecretRandom`.
        seed: makes sampling and noise repeatable, for tests. None for secret ones, anew at every start; anything else
            gives no privacy against those who know it.
        check: take trial steps before training, on random pixels, by which layers and losses are found that mix
            samples, and the gradients of the samples are held against the gradient of their batch.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        target_epsilon: float | None = None,
        target_delta: float = 1e-5,
        noise_multiplier: float | None = None,
        max_grad_norm: float = 1.0,
        accountant: Mechanism = "prv",
        poisson_sampling: bool = True,
        physical_batch_size: int | None = None,
        clipping: Clipping = "flat",
        views: int = 1,
        secure_mode: bool = False,
        seed: int | None = None,
        check: bool = True,
    ) -> None:
        for name, value, allowed, good in (
            ("target_epsilon", target_epsilon, "above 0", target_epsilon is None or 0 < target_epsilon < math.inf),
            ("target_delta", target_delta, "above 0 and below 1", 0 < target_delta < 1),
            ("noise_multiplier", noise_multiplier, "0 or above", noise_multiplier is None or noise_multiplier >= 0),
            ("max_grad_norm", max_grad_norm, "above 0", 0 < max_grad_norm < math.inf),
            ("accountant", accountant, " or ".join(get_args(Mechanism)), accountant in get_args(Mechanism)),
            (
                "physical_batch_size",
                physical_batch_size,
                "1 or above",
                physical_batch_size is None or physical_batch_size >= 1,
            ),
            ("clipping", clipping, " or ".join(get_args(Clipping)), clipping in get_args(Clipping)),
            ("views", views, "1 or above", views >= 1),
        ):
            if not good:
                raise ValueError(f"DifferentialPrivacy: {name} must be {allowed}, got {value!r}")
        if target_epsilon is None and noise_multiplier is None:
            raise ValueError(
                "DifferentialPrivacy: target_epsilon or noise_multiplier is needed: the privacy to keep, or the noise"
            )
        self.target_epsilon, self.target_delta = target_epsilon, target_delta
        self.noise_multiplier, self.max_grad_norm = noise_multiplier, max_grad_norm
        self.accountant: Mechanism = accountant
        self.poisson_sampling, self.physical_batch_size = poisson_sampling, physical_batch_size
        self.clipping: Clipping = clipping
        self.views, self.secure_mode, self.seed, self.check = views, secure_mode, seed, check
        self.plan: Plan | None = None
        self.spent: list[Steps] = []
        self._known: tuple[list[Steps], float] | None = None
        self._planned_before: dict[str, Any] = {}
        self._restore: list[Callable[[], None]] = []
        self._gradients: PerSampleGradients | None = None
        self._parameters: list[Any] = []
        self._started = self._noised = self._in_piece = 0
        self._reduction: Literal["mean", "sum"] = "mean"

    # ---- before the first step

    def check_before(self, trainer: Trainer, task: LightningModule, data: LightningDataModule | None) -> None:
        """Refuse what private training cannot be combined with; `knl fit` asks before it reads any data.

        Raises:
            ValueError: if the run cannot be private; the message says why and what to do.
        """
        check_run(trainer, task)
        check_data(data)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what private training cannot be combined with, and take over the training loader.

        Raises:
            ValueError: if the run cannot be private; the message says why and what to do.
        """
        if stage != "fit":
            return
        self.check_before(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        source = trainer.fit_loop._data_source
        self._random = SecretRandom(self._key(trainer), self.secure_mode)
        self._restore = []
        self._set(trainer.fit_loop, "_data_source", _DataLoaderSource(None, "train_dataloader"))
        loader = source.dataloader()
        check_loader(loader)
        samples, ranks = len(loader.dataset), trainer.world_size
        batch = cast(int, loader.batch_size) * ranks * trainer.accumulate_grad_batches
        self._check_samples(samples, batch)
        pieces = trainer.accumulate_grad_batches
        if self.physical_batch_size is not None:
            pieces = math.ceil(batch * self.views / (self.physical_batch_size * ranks))
        epoch_steps = max(1, round(samples / batch)) if self.poisson_sampling else samples // batch
        trainer.fit_loop._data_source.instance = PrivateLoader(
            loader, batch / samples, epoch_steps, pieces, self.views, self._random,
            ranks, trainer.global_rank, lambda: trainer.global_step, self.poisson_sampling,
        )  # fmt: skip
        self._samples, self._batch, self._pieces = samples, batch, pieces
        # Lightning counts batches, of which a step now has `pieces`
        self._set(trainer, "accumulate_grad_batches", pieces)
        for name in ("limit_train_batches", "val_check_interval"):
            if isinstance(given := getattr(trainer, name), int) and not isinstance(given, bool):
                self._set(trainer, name, given * pieces)
        self._count_steps(trainer)

    def plan_for(self, samples: int, batch: int, epoch_steps: int, steps: int, taken: int = 0) -> Plan:
        """Find the noise of a run, or how long its budget lasts.

        Args:
            samples: training samples.
            batch: samples in a step.
            epoch_steps: steps in an epoch.
            steps: steps of the whole run.
            taken: how many of them were taken before; what they have cost is in `spent`.

        Raises:
            ValueError: if the target cannot be reached.
        """
        self._check_samples(samples, batch)
        rate, left = batch / samples, steps - taken
        noise, last = self.noise_multiplier, steps
        if noise is None:
            assert self.target_epsilon is not None  # one of the two is given
            promise = {"target_epsilon": self.target_epsilon, "target_delta": self.target_delta, "rate": rate}
            promise |= {"steps": steps, "accountant": self.accountant}  # type: ignore[dict-item]
            before = {**self._planned_before, **self._planned_before.get("plan", {})}
            straight = taken == sum(count for _, _, count in self.spent)  # no steps that are taken again
            if before and straight and all(before[key] == value for key, value in promise.items()):
                noise = float(before["noise"])  # as it was, to the last digit
            else:
                noise = noise_for(self.target_epsilon, self.target_delta, rate, left, self.accountant, self.spent)
                if before:
                    _say(f"Privacy: the noise changes from {before['noise']:.4g} to {noise:.4g} for the steps to come.")
        elif self.target_epsilon is not None and noise > 0:
            last = taken + affordable_steps(
                self.target_epsilon, self.target_delta, noise, rate, left, self.accountant, self.spent
            )
            if last == taken and left > 0:
                past = epsilon(self.spent, self.target_delta, self.accountant)
                raise ValueError(
                    f"target_epsilon {self.target_epsilon:g} does not pay for another step with noise_multiplier"
                    f" {noise:g}, {past:.4g} is spent: raise one of them"
                )
        return Plan(samples, batch, rate, epoch_steps, steps, noise, last)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the noise, now that it is known how many steps there are and were; watch the layers.

        Raises:
            ValueError: if the target cannot be reached, or the network or its loss mix samples.
        """
        if trainer.num_training_batches % self._pieces:
            raise ValueError(
                f"trainer.limit_train_batches leaves {trainer.num_training_batches} batches in an epoch, which are no"
                f" whole steps of {self._pieces}: give the number of steps instead"
            )
        self._recall_report(trainer)
        steps = trainer.estimated_stepping_batches
        if math.isinf(steps) and self.noise_multiplier is None:
            raise ValueError(
                "the noise for target_epsilon depends on the number of steps, and this run has no end: set"
                " trainer.max_epochs or max_steps, or noise_multiplier"
            )
        epoch_steps = int(trainer.num_training_batches) // self._pieces
        bounded = int(steps) if not math.isinf(steps) else 10**9
        self.plan = self.plan_for(self._samples, self._batch, epoch_steps, bounded, trainer.global_step)
        if self.check:
            batch = self._probe_batch(trainer, pl_module)
            check_independence(pl_module, batch)
            check_gradients(pl_module, batch)
            self._reduction = loss_reduction(pl_module, batch)
        self._gradients = PerSampleGradients(pl_module, "sum", self.views)  # the scale is known here
        self._gradients.attach()
        self._restore.append(self._gradients.detach)
        self._parameters = [p for p in pl_module.parameters() if p.requires_grad]
        self._wrap_training_step(pl_module)
        if isinstance(trainer.strategy, DDPStrategy):
            # the gradients of single devices are nobody's business, nor the mean that DDP would take of them
            cast(Any, trainer.model).require_backward_grad_sync = False
        if self.accountant == "gdp":
            _say(f"Privacy: {GDP}.")
        if self.plan.last_step < self.plan.steps:
            _say(f"Privacy: the budget is spent after step {self.plan.last_step} of {self.plan.steps}; training stops.")

    # ---- every step

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clip what each sample of a piece contributes, and add it up."""
        if not trainer.training or self._gradients is None:
            return
        samples, self._in_piece = self._in_piece, 0
        if samples:
            scale = self._pieces * (samples if self._reduction == "mean" else 1.0)
            norms = self._gradients.norms() * scale
            self._gradients.accumulate(clipping_weights(norms, self.max_grad_norm, self.clipping) * scale)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Put the noisy sum in the place of the gradient."""
        assert self.plan is not None
        assert self._gradients is not None
        if trainer.global_step >= self.plan.last_step:
            raise RuntimeError(f"privacy: the budget allows {self.plan.last_step} steps, and another one was begun")
        for parameter, part in zip(self._parameters, self.noisy_gradient(trainer, trainer.global_step), strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part)
        self.spent = merged([*self.spent, (self.plan.noise, self.plan.rate, 1)])
        self._noised += 1

    def noisy_gradient(self, trainer: Trainer, step: int) -> list[Tensor]:
        """Turn the sums of the step's gradients, over all devices, into what the optimizer gets, and forget them.

        Args:
            trainer: of the run.
            step: number of the step, which the noise belongs to.

        Returns:
            a tensor for each trainable parameter.
        """
        assert self.plan is not None
        total = self.taken_sums()
        if trainer.is_global_zero and self.plan.noise > 0:
            noise = self._random.normal(len(total), "noise", step, total.device)
            total.add_(noise, alpha=self.plan.noise * self.max_grad_norm)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        parts = total.div_(self.plan.batch).split([parameter.numel() for parameter in self._parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that every step was noised and counted; stop when the budget is spent.

        Raises:
            RuntimeError: if a step of the optimizer went by this callback.
        """
        if (batch_idx + 1) % self._pieces:
            return
        assert self.plan is not None
        if self._started + self._noised != trainer.global_step:
            raise RuntimeError(
                f"privacy: the optimizer has taken {trainer.global_step - self._started} steps since the start, and"
                f" {self._noised} of them got noise; the weights are not private"
            )
        if trainer.global_step >= self.plan.last_step:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is spent."""
        spent = self.epsilon
        pl_module.log("privacy/epsilon", spent, prog_bar=True, logger=False, rank_zero_only=True)
        for logger in trainer.loggers:  # not by pl_module.log, which writes only after the epoch's checkpoint
            logger.log_metrics({"privacy/epsilon": spent, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was spent."""
        if self._noised:
            _say(f"Privacy:    {self.statement()}")

    def taken_sums(self) -> Tensor:
        """Take away this device's sums of the step's gradients, as one vector; zero for what no sample has reached."""
        parts = []
        for parameter in self._parameters:
            total = getattr(parameter, "summed_grad", None)
            parts.append(torch.zeros_like(parameter).flatten() if total is None else total.flatten())
            parameter.summed_grad = None
        return torch.cat(parts)

    # ---- what is kept

    @property
    def epsilon(self) -> float:
        """What was spent, at `target_delta`."""
        if self._known is None or self._known[0] != self.spent:  # prv takes half a second
            self._known = (self.spent, epsilon(self.spent, self.target_delta, self.accountant))
        return self._known[1]

    def statement(self) -> str:
        """Put what was spent into a sentence, with what it rests on."""
        assert self.plan is not None
        doubt = ""
        if not self.poisson_sampling:
            doubt += "; NOMINAL: batches were shuffled, and the accountant supposes Poisson sampling"
        if self.accountant == "gdp":
            doubt += "; gdp understates epsilon"
        if self.seed is not None:
            doubt += "; sampling and noise can be repeated by those who know the seed"
        return (
            f"epsilon {self.epsilon:.3f} at delta {self.target_delta:g} ({self.accountant}), after"
            f" {sum(count for _, _, count in self.spent)} steps with noise {self.plan.noise:.4g}, clipping at"
            f" {self.max_grad_norm:g} and a sampling rate of {self.plan.rate:.4g}{doubt}"
        )

    def report(self) -> dict[str, Any]:
        """Return what was promised and what was spent, in plain values."""
        assert self.plan is not None
        return {
            "epsilon": self.epsilon if math.isfinite(self.epsilon) else None,
            "target_epsilon": self.target_epsilon,
            "target_delta": self.target_delta,
            "accountant": self.accountant,
            "sampling": "poisson" if self.poisson_sampling else "shuffled; epsilon is nominal",
            "relation": "add or remove one training sample; their number and the sampling rate are public",
            "clipping": self.clipping,
            "max_grad_norm": self.max_grad_norm,
            "views": self.views,
            "secure_mode": self.secure_mode,
            "seeded": self.seed is not None,
            "plan": asdict(self.plan),
            "history": [list(steps) for steps in self.spent],
        }

    def state_dict(self) -> dict[str, Any]:
        """Store what was spent."""
        return self.report() if self.plan is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was spent before."""
        if state_dict:
            self._planned_before = state_dict
            self.spent = _history(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the report before the checkpoint, so that no checkpoint is ever there which it does not count."""
        if self.plan is not None and trainer.is_global_zero:
            with replacing(Path(trainer.default_root_dir) / REPORT) as temporary:
                temporary.write_text(json.dumps(self.report(), indent=1) + "\n")

    def _recall_report(self, trainer: Trainer) -> None:
        """Count the steps of checkpoints, too, that are later than the one the run goes on from.

        They have been released and are now trained again, with other samples and noise. They may lie in the run
        directory, or in that of the checkpoint.
        """
        self._started, self._noised, self._in_piece = trainer.global_step, 0, 0
        directories = [Path(trainer.default_root_dir)]
        if trainer.ckpt_path and (other := run_of(Path(trainer.ckpt_path))):
            directories.append(other)
        if not self._planned_before:
            if trainer.global_step:
                raise ValueError(
                    "the checkpoint was trained without differential privacy, or without counting it: what it owes to"
                    " the training samples cannot be bounded. Start a new run"
                )
            return
        for path in (directory / REPORT for directory in directories):
            written = _history(json.loads(path.read_text())) if path.is_file() else []
            if sum(row[2] for row in written) > sum(row[2] for row in self.spent):
                self.spent = written

    def _check_samples(self, samples: int, batch: int) -> None:
        if batch > samples:
            raise ValueError(
                f"a step of {batch} samples (data.batch_size x devices x trainer.accumulate_grad_batches) is more than"
                f" the {samples} training samples: lower data.batch_size"
            )
        if self.target_delta >= 1 / samples:
            raise ValueError(
                f"target_delta {self.target_delta:g} must be below 1 / {samples} = {1 / samples:.2g}, the number of"
                " training samples: with a larger one, publishing a sample at random would count as private"
            )

    def _key(self, trainer: Trainer) -> bytes:
        if self.seed is not None:
            return known_key(self.seed)
        return trainer.strategy.broadcast(fresh_key())

    def _probe_batch(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Make a batch of a few samples with random pixels, so that the trial tells nothing of the real ones."""
        loader = cast(PrivateLoader, trainer.fit_loop._data_source.instance)
        pieces = cast(Any, loader.loader.dataset)
        batch = pieces[[loader._index(0, image, 0) for image in range(min(PROBED, self._samples))]]
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        generator = torch.Generator().manual_seed(0)

        def noise(part: Tensor) -> Tensor:
            return torch.rand(part.shape, generator=generator).to(part) if part.is_floating_point() else part

        return tree_map_only(Tensor, noise, batch)

    def _wrap_training_step(self, pl_module: LightningModule) -> None:
        """Count the samples of a piece, and let an empty one cost nothing and change nothing."""
        original = pl_module.training_step

        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            images = next(part for part in tree_leaves(batch) if isinstance(part, Tensor))
            self._in_piece, rest = divmod(len(images), self.views)
            if rest:
                raise RuntimeError(
                    f"privacy: {len(images)} images came, and each sample has {self.views} views: one could not be read"
                )
            if not self._in_piece:
                return torch.zeros((), device=pl_module.device, requires_grad=True)
            result = original(batch, *args, **kwargs)
            if result is None:
                raise ValueError(
                    "training_step returned None: to leave out a step is a choice that depends on the data, which"
                    " private training does not count"
                )
            return result

        self._set(pl_module, "training_step", training_step)
        # a sample that is not finite contributes nothing; to end the run because of it would tell of it
        self._set(pl_module, "stop_at_nonfinite", False)

    def _count_steps(self, trainer: Trainer) -> None:
        """Let the progress bar count steps in place of pieces."""
        bar, pieces = trainer.progress_bar_callback, self._pieces
        if bar is None or pieces == 1:
            return
        base: Any = type(bar)

        class BySteps(base):
            @property
            def total_train_batches(self) -> int | float:
                return super().total_train_batches // pieces

            def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
                super().on_train_batch_start(trainer, module, batch, batch_idx // pieces)

            def on_train_batch_end(
                self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                if (batch_idx + 1) % pieces == 0:
                    super().on_train_batch_end(trainer, module, outputs, batch, batch_idx // pieces)

        self._set(bar, "__class__", BySteps)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute until the run is over."""
        if name in vars(owner) or not isinstance(owner, nn.Module):
            before = getattr(owner, name)
            self._restore.append(lambda: setattr(owner, name, before))
        else:
            self._restore.append(lambda: delattr(owner, name))
        setattr(owner, name, value)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put everything back."""
        self._put_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        self._put_back()

    def _put_back(self) -> None:
        while self._restore:
            self._restore.pop()()
        for parameter in self._parameters:
            if hasattr(parameter, "summed_grad"):
                del parameter.summed_grad
        self._gradients, self._parameters = None, []


def clipping_weights(norms: Tensor, bound: float, clipping: Clipping) -> Tensor:
    """Compute by what each sample's gradient is scaled; 0 where it is not finite.

    Args:
        norms: (N,), of the gradients.
        bound: on the scaled norm.
        clipping: as in :class:`DifferentialPrivacy`.
    """
    bound = bound * (1.0 - MARGIN)
    weights = (bound / norms).clamp(max=1.0) if clipping == "flat" else bound / (norms + 0.01)
    return torch.where(norms.isfinite(), weights, 0.0)


def _history(state: dict[str, Any]) -> list[Steps]:
    return [(float(noise), float(rate), int(steps)) for noise, rate, steps in state["history"]]


@rank_zero_only
def _say(message: str) -> None:
    print(message, flush=True)
