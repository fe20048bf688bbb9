"""Apply a checkpoint to images of your own; writes tables, pictures and a page."""

from datetime import datetime
from pathlib import Path

from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser

from knlightning.callbacks import PredictionWriter
from knlightning.commands.early import USAGES
from knlightning.commands.lightning_cli import KNLightningCLI
from knlightning.commands.output import say
from knlightning.text import counted

WRITTEN = ("predictions.csv", "predictions", "predictions.html")


class PredictCLI(KNLightningCLI):
    """`knl predict`."""

    command = "predict"
    usage = USAGES["predict"]
    starts_runs = True
    own_arguments = ("out",)

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        """Add where to write."""
        parser.add_argument(
            "--out",
            type=str | None,
            default=None,
            help="Directory for the predictions, without any so far; null for the run, where they are replaced.",
        )

    def check_own_arguments(self) -> None:
        """Refuse to replace predictions that are not those of the run."""
        if self.config.out is None:
            return
        self.starts_runs = False
        if there := [path for name in WRITTEN if (path := Path(self.config.out) / name).exists()]:
            raise ValueError(f"--out {self.config.out} holds {there[0].name} already: choose another directory")

    def execute(self) -> None:
        """Write the predictions, and say where they lie."""
        writer: PredictionWriter = self.config_init.predictions
        if self.config.out is not None:
            writer.directory = Path(self.config.out)
        elif there := [path for name in WRITTEN[:2] if self.run_dir and (path := self.run_dir / name).exists()]:
            written = datetime.fromtimestamp(there[0].stat().st_mtime)
            told = f"Replaces {there[0]} of {written:%Y-%m-%d %H:%M}; --out DIRECTORY keeps both."
            tell = LambdaCallback(on_predict_start=lambda trainer, module: say(told))  # once the images are found
            self.trainer.callbacks.append(tell)  # type: ignore[attr-defined] # as in Lightning's docs
        self.trainer.predict(**self.trainer_arguments(), return_predictions=False)
        assert writer.path is not None
        say(f"Predictions of {counted(writer.rows, 'image')}: {writer.path}")
        say(f"Look at them: {writer.path.with_name(WRITTEN[2])}")


main = PredictCLI
