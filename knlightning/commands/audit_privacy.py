"""Check the promises of a private run: bounds, noise, sampling, epsilon.

    knl audit-privacy --config configs/digits_dp.yaml
    knl audit-privacy --config configs/digits_dp.yaml --canaries 500

The checks are those of `knlightning.privacy.audit`.
"""

from typing import Any, ClassVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from knlightning.commands.arguments import as_list
from knlightning.commands.lightning_cli import KNLightningCLI
from knlightning.commands.output import say
from knlightning.privacy import DifferentialPrivacy
from knlightning.privacy.audit import PrivacyAudit


class AuditPrivacyCLI(KNLightningCLI):
    """`knl audit-privacy`: configuration as for `knl fit`; writes nothing, and trains only for canaries."""

    command = "audit-privacy"
    usage = "--config FILE [--samples N] [--canaries M] [--key value ...]"
    own_arguments: ClassVar[tuple[str, ...]] = ("samples", "canaries")

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        """Add the size of the audit."""
        parser.add_argument("--samples", type=int, default=8, help="Samples that are removed, one by one.")
        canaries = "Canaries for a lower bound on epsilon; the run is trained with them, and nothing of it is kept."
        parser.add_argument("--canaries", type=int, default=0, help=canaries)

    def check_own_arguments(self) -> None:
        """Check what needs no run."""
        if self.config.ckpt_path is not None:
            raise ValueError("--ckpt_path: an audit is of a run from its beginning; leave it out")
        self.audit = PrivacyAudit(self.config.samples, self.config.canaries)
        self.ending: Callback = self.audit

    def without_checkpoint(self, launched: bool) -> None:
        """Go on: an audit needs none."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make one with the private callback and what ends the run, and nothing that writes."""
        trainer = self.config_init.trainer
        self.private = [
            callback for callback in as_list(trainer.callbacks) if isinstance(callback, DifferentialPrivacy)
        ]
        if not self.private:
            raise ValueError(
                f"{self.command} needs a private run: add knlightning.privacy.DifferentialPrivacy to trainer.callbacks"
            )
        settled: dict[str, Any] = {"callbacks": [*self.private, self.ending], "logger": False}
        settled |= {"limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_checkpointing": False}
        settled |= {"enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(**{**trainer.as_dict(), **settled})

    def execute(self) -> None:
        """Begin to train, which the audit ends, or lets go on with canaries."""
        self.private[0].check_before(self.trainer, self.model, self.datamodule)
        self.trainer.fit(self.model, datamodule=self.datamodule)
        for finding in self.audit.findings:
            say(f"{'pass' if finding.passed else 'FAIL'}  {finding.name}: {finding.text}")
        if not all(finding.passed for finding in self.audit.findings):
            raise SystemExit(1)


main = AuditPrivacyCLI
