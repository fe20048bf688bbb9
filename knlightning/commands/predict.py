"""Apply a checkpoint to images of your own; writes predictions.csv, or for segmentation predictions/."""

from knlightning.callbacks import PredictionWriter
from knlightning.commands.lightning_cli import KNLightningCLI
from knlightning.commands.output import say


class PredictCLI(KNLightningCLI):
    """`knl predict`."""

    command = "predict"
    starts_runs = True

    def execute(self) -> None:
        """Write the predictions, and say where they lie."""
        self.trainer.predict(**self.trainer_arguments(), return_predictions=False)
        writer: PredictionWriter = self.config_init.predictions
        say(f"Predictions of {writer.rows} images: {writer.path}")


def main(args: list[str]) -> PredictCLI:
    """Run `knl predict`.

    Args:
        args: Command line after `predict`.
    """
    return PredictCLI(args)
