"""Differentially private training (DP-SGD; Abadi et al., 2016) as a callback of any run."""

from contextlib import ExitStack
from functools import partial
from typing import Any, get_args

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from knlightning.checks import ArgumentError, check_choice, check_number
from knlightning.internals.lightning import counting_steps, is_fitting, overridden, replaced_train_loader
from knlightning.privacy.accounting import GDP_WARNING, Accountant
from knlightning.privacy.batch_hooks import hooks_by_sample
from knlightning.privacy.clipping import ClippedSum, Clipping
from knlightning.privacy.continuation import plan_run, take_up_history
from knlightning.privacy.ledger import Ledger, statement, write_report
from knlightning.privacy.loader import PrivateLoader, private_loader
from knlightning.privacy.plan import Budget, Plan
from knlightning.privacy.private_metrics import METRICS_SHARE, PrivateMetrics
from knlightning.privacy.private_step import PrivateStep, check_weights
from knlightning.privacy.randomness import SecretRandom, fresh_key, known_key
from knlightning.privacy.refusals import check_data, check_run
from knlightning.privacy.stored_values import check_monitors, watched_values
from knlightning.run_directory import report_directory

print_once = rank_zero_only(print)


class DifferentialPrivacy(Callback):
    """Train with (epsilon, delta)-differential privacy for the training samples, by DP-SGD.

    Every step takes each training sample with the same probability, independently (Poisson sampling); bounds the
    norm of each sample's gradient; adds up; and adds Gaussian noise. What is guaranteed is that the checkpoints of the
    run, taken together, are (epsilon, delta)-differentially private in the zero-out relation: a training sample is
    replaced by one that contributes nothing; the number of samples is public. Not covered are validation and test
    images, by which the best checkpoint is chosen; the log, whose training losses have no noise and whose throughput
    tells of the sizes of batches; and the choice of hyperparameters by further runs.

    Added to a run by one line, for any task whose loss is a mean (or sum) over the samples of a batch:

        trainer:
          callbacks+: {class_path: knlightning.privacy.DifferentialPrivacy, init_args: {target_epsilon: 8.0, ...}}

    A step takes as many samples on average as a step of the same run without privacy: the batch size of the training
    loader times the number of devices and the trainer's accumulate_grad_batches. Epochs, schedules, the log, the
    trainer's limit_train_batches and the progress bar count such steps. In checkpoints the weights have the same names
    as ever, and `privacy.json` beside them says what was spent.

    Args:
        target_epsilon: The budget. The noise is calibrated for it, if not given; with `noise_multiplier`, training
            stops before the step that would exceed it.
        target_delta: Probability with which the guarantee may fail, above 0 and below 1 / (number of samples).
        noise_multiplier: Standard deviation of the noise over max_grad_norm; None to calibrate it for the budget.
        max_grad_norm: Bound on the norm of a sample's gradient, above 0.
        accountant: "prv" (tight, an upper bound), "pld" (the same by dp-accounting), "rdp" (that of the paper) or "gdp"
            (understates; for comparison).
        poisson_sampling: False for batches of equal size from a shuffled set, as without privacy. What the accountant
            computes does not hold for these, and epsilon is reported as nominal.
        physical_batch_size: Number of images (samples times views) that go through the network at once on each
            device, on average; None for as many as a step has, over the trainer's accumulate_grad_batches.
        max_physical_batch_size: The same at most, in place of the average, so that the memory of a device can be
            planned. A step has as many micro-batches as make it improbable that one would be larger, and is cut where
            one would; delta includes the probability of that. None for no bound.
        private_metrics: Log the share of clipped samples and the training accuracy of each epoch, `privacy/clipped` and
            `privacy/train_acc`, with noise: epsilon covers them, and callbacks may follow them. It stays as it is, for
            1 % more noise on the gradient. The accuracy is there if the training step calls the task itself.
        clipping: "flat" scales the gradients down whose norm is above the bound; "automatic" scales each to the
            bound, over its norm + 0.01, so that the bound is only a part of the learning rate (Bu et al., 2023).
        views: Number of augmented views of each sample, whose gradients are averaged before they are clipped; at
            least 1 (augmentation multiplicity; De et al., 2022). At 1, samples are augmented as without privacy.
        secure_mode: Draw sampling and noise by a cryptographic generator, and guard the noise against attacks on
            its rounding; see `knlightning.privacy.randomness.SecretRandom`.
        seed: Makes sampling and noise repeatable, for tests. None for secret ones, anew at every start; anything else
            gives no privacy against those who know it.
        check: Take trial steps before training, on random pixels. They find layers and losses that mix samples, and
            compare the gradients of the samples with the gradient of their batch. Reports say it if there were none.

    Attributes:
        budget: The privacy to keep.
        ledger: What was spent so far.
        plan: The steps of the run and their noise; None before training.

    Raises:
        ArgumentError: If an argument is out of its range.
        ValueError: If there is neither a target nor noise.
    """

    loader: PrivateLoader

    def __init__(
        self,
        target_epsilon: float | None = None,
        target_delta: float = 1e-5,
        noise_multiplier: float | None = None,
        max_grad_norm: float = 1.0,
        accountant: Accountant = "prv",
        poisson_sampling: bool = True,
        physical_batch_size: int | None = None,
        clipping: Clipping = "flat",
        views: int = 1,
        secure_mode: bool = False,
        seed: int | None = None,
        check: bool = True,
        max_physical_batch_size: int | None = None,
        private_metrics: bool = False,
    ) -> None:
        check_number("max_grad_norm", max_grad_norm, above=0)
        none = "all images of a step"
        check_number("physical_batch_size", physical_batch_size, at_least=1, integer=True, none=none)
        none = "no bound"
        check_number("max_physical_batch_size", max_physical_batch_size, at_least=1, integer=True, none=none)
        cut = max_physical_batch_size is not None
        if cut and physical_batch_size is not None:
            raise ArgumentError(
                "physical_batch_size", physical_batch_size, "null where max_physical_batch_size is given"
            )
        check_choice("clipping", clipping, get_args(Clipping))
        check_number("views", views, at_least=1, integer=True)
        self.budget = Budget(target_epsilon, target_delta, noise_multiplier, accountant, cut)
        self.ledger = Ledger(self.budget.accounted_delta, accountant)
        self.plan: Plan | None = None
        self.max_grad_norm, self.views, self.seed, self.check = max_grad_norm, views, seed, check
        self.clipping: Clipping = clipping
        self.poisson_sampling, self.physical_batch_size = poisson_sampling, physical_batch_size
        self.max_physical_batch_size, self.secure_mode = max_physical_batch_size, secure_mode
        self.metrics_share = METRICS_SHARE if private_metrics else 0.0
        self._undo, self._saving = ExitStack(), ExitStack()
        self._steps_before = self._noisy_steps = 0

    # ---- before the first step

    def check_before(self, trainer: Trainer, task: LightningModule, data: LightningDataModule | None) -> None:
        """Refuse what private training cannot be combined with; `knl fit` asks before it reads any data.

        Raises:
            ValueError: If the run cannot be private; the message says why and what to do.
        """
        check_run(trainer, task)
        check_monitors(trainer)
        check_data(data)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what private training cannot be combined with, and take over the training loader.

        Raises:
            ValueError: If the run cannot be private; the message says why and what to do.
        """
        if stage != "fit":
            return
        self._saving.close()
        self.check_before(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined] # set by Lightning
        self.ledger.restored = {}  # a checkpoint is read after this
        key = trainer.strategy.broadcast(fresh_key()) if self.seed is None else known_key(self.seed)
        self.random = SecretRandom(key, self.secure_mode)
        take_over = partial(
            private_loader,
            trainer=trainer,
            random=self.random,
            target_delta=self.budget.target_delta,
            physical_batch_size=self.physical_batch_size,
            max_physical_batch_size=self.max_physical_batch_size,
            views=self.views,
            poisson_sampling=self.poisson_sampling,
        )
        self.loader = self._undo.enter_context(replaced_train_loader(trainer, take_over))
        self._undo.enter_context(counting_steps(trainer, self.loader.micro_batches))
        bounds: dict[str, Any] = {"max_grad_norm": self.max_grad_norm, "clipping": self.clipping}
        sums = partial(ClippedSum, views=self.views, metrics_share=self.metrics_share, **bounds)
        metrics = PrivateMetrics(pl_module) if self.metrics_share else None
        self._step = PrivateStep(trainer, pl_module, self.loader, self.random, sums, self.check, metrics)
        self._undo.callback(self._step.close)
        hooks = hooks_by_sample(trainer, pl_module, self.views, self._step.seed, self._step.follow_freezing)
        self._undo.enter_context(hooks)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the noise, now that it is known how many steps there are and were, and watch the layers.

        Raises:
            ValueError: If the budget cannot be kept, or the network or its loss mix samples.
        """
        self._steps_before, self._noisy_steps = trainer.global_step, 0
        self._directory = report_directory(trainer)
        given = {"shuffled": not self.poisson_sampling, "seeded": self.seed is not None, "unchecked": not self.check}
        self.ledger.begin(*(doubt for doubt, holds in given.items() if holds))
        take_up_history(self.ledger, trainer, pl_module, self._directory)
        self.plan = plan_run(self.budget, self.ledger, trainer, self.loader)
        self._stored = self._undo.enter_context(watched_values(trainer, pl_module))
        self._step.watch()
        # a sample that is not finite contributes nothing; to end the run because of it would tell of it
        self._undo.enter_context(overridden(pl_module, "stop_at_nonfinite", False))
        if isinstance(trainer.strategy, DDPStrategy):
            # the sums of the devices are private only together with their noise, which DDP knows nothing of
            self._undo.enter_context(trainer.model.no_sync())  # type: ignore[union-attr, operator] # that of DDP
        # to the next fit, for the weights may still be saved after an exception or the end
        save = partial(self._save, trainer, trainer.save_checkpoint)
        self._saving.enter_context(overridden(trainer, "save_checkpoint", save))
        if self.budget.accountant == "gdp":
            print_once(f"Privacy: {GDP_WARNING}.", flush=True)
        if self.plan.affordable_steps < self.plan.num_steps:
            step = f"step {self.plan.affordable_steps} of {self.plan.num_steps}"
            print_once(f"Privacy: the budget is spent after {step}; training stops.", flush=True)
            loop = trainer.fit_loop  # a minimum of epochs or steps would have it go on
            self._undo.enter_context(overridden(loop, "min_epochs", None))
            self._undo.enter_context(overridden(loop.epoch_loop, "min_steps", None))

    # ---- every step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an epoch that was left within a step has summed up: the step begins anew, with its samples."""
        self._step.begin()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check that the step before has left nothing of its samples in what a checkpoint holds."""
        self._stored.check()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the same, after the last step of an epoch."""
        if is_fitting(trainer) and not trainer.sanity_checking:
            self._stored.check_last()

    @property
    def sums(self) -> ClippedSum:
        """The clipped sum of the step; there is one in training only."""
        return self._step.sums

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clip what each sample of a micro-batch contributes, and add it up."""
        self._step.add()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Put the noisy sum in the place of the gradient.

        Raises:
            RuntimeError: If the budget is spent.
            ValueError: If the optimizer holds other parameters too.
        """
        assert self.plan is not None
        if trainer.global_step >= self.plan.affordable_steps:
            raise RuntimeError(f"privacy: the budget allows {trainer.global_step} steps, and another one was begun")
        self._step.finish(self.noisy_gradient(trainer, trainer.global_step))
        self.ledger.record(self.plan.noise_multiplier, self.plan.sampling_probability)
        self._noisy_steps += 1

    def noisy_gradient(self, trainer: Trainer, step: int) -> Tensor:
        """Take the sums of the step's gradients from all devices, and make of them what the optimizer gets.

        Args:
            trainer: Of the run.
            step: Number of the step, which the noise belongs to.

        Returns:
            A float64 vector, for the trainable parameters in their order: it is rounded once, with its noise.
        """
        assert self.plan is not None
        total = self.sums.pop()
        if trainer.is_global_zero and self.plan.noise_multiplier > 0:
            noise = self.random.normal(len(total), "noise", step, total.device)
            total.add_(noise, alpha=self.plan.noise_multiplier * self.sums.sensitivity)
        return trainer.strategy.reduce(total, reduce_op="sum").div_(self.plan.batch_size)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that every step was noised and counted; stop when the budget is spent.

        Raises:
            FloatingPointError: If the weights are not finite.
            RuntimeError: If the optimizer took a step without noise.
        """
        if (batch_idx + 1) % self.loader.micro_batches:
            return
        assert self.plan is not None
        check_weights(self.sums.parameters, trainer.global_step)
        steps = trainer.global_step - self._steps_before
        if self._noisy_steps != steps:
            raise RuntimeError(
                f"privacy: the optimizer has taken {steps} steps since the start, and {self._noisy_steps} of them got"
                " noise; the weights are not private"
            )
        if trainer.global_step >= self.plan.affordable_steps:
            trainer.should_stop = True

    # ---- what is kept

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is spent, and what may be shown of the samples."""
        self._stored.check_last()
        values = {"privacy/epsilon": self.ledger.epsilon, **(self._step.metrics.pop() if self._step.metrics else {})}
        for name, value in values.items():
            pl_module.log(name, value, prog_bar=True, logger=False, rank_zero_only=True)
        for logger in trainer.loggers:  # not by pl_module.log, which writes only after the epoch's checkpoint
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was spent."""
        if self._noisy_steps:
            print_once(f"Privacy:    {statement(self.report())}", flush=True)

    def report(self) -> dict[str, Any]:
        """Return what was promised and what was spent, in plain values."""
        promise = {
            "target_epsilon": self.budget.target_epsilon,
            "target_delta": self.budget.target_delta,
            "accounted_delta": self.budget.accounted_delta,
            "accountant": self.budget.accountant,
            "relation": "zero-out of one training sample; their number and the sampling probability are public",
            "max_physical_batch_size": self.max_physical_batch_size,
            "clipping": self.clipping,
            "max_grad_norm": self.max_grad_norm,
            "metrics_share": self.metrics_share,
            "views": self.views,
            "secure_mode": self.secure_mode,
        }
        return self.ledger.report(promise, self.plan)

    def state_dict(self) -> dict[str, Any]:
        """Store what was spent."""
        return self.report() if self.plan is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was spent before."""
        if state_dict:
            self.ledger.restore(state_dict)

    def _save(self, trainer: Trainer, original: Any, path: Any, weights_only: Any = None, **more: Any) -> None:
        """Write the report before a checkpoint of weights alone, too; callbacks are not asked about these."""
        if weights_only and trainer.is_global_zero:
            write_report(self._directory, self.report())
        original(path, weights_only, **more)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the report before the checkpoint, so that no checkpoint is ever there which it does not count."""
        if self.plan is not None and trainer.is_global_zero:
            write_report(self._directory, self.report())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put everything back."""
        self._undo.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        self._undo.close()
