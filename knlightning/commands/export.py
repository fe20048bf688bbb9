"""Write the network of a checkpoint for other programs, checked against the network itself.

    knl export --config RUN/config.yaml --ckpt_path best --to DIR --format safetensors onnx

The work is done by `knlightning.export`.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from knlightning.checkpoint_files import read_checkpoint
from knlightning.checks import check_number
from knlightning.commands.lightning_cli import KNLightningCLI
from knlightning.export import FORMATS, PREPROCESSING, check_request, export, preprocessing_of
from knlightning.tasks import SegmentationTask, Task


class ExportCLI(KNLightningCLI):
    """`knl export`: configuration, run and checkpoint as for `knl test`, but no trainer."""

    command = "export"
    usage = "--config FILE --ckpt_path best --to DIRECTORY [--format NAME ...] [--key value ...]"
    own_arguments = ("to", "format", "image_size")

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        """Add where and what to write."""
        parser.add_argument("--to", type=str | None, default=None, help="Directory for the files; new, or empty.")
        parser.add_argument(
            "--format",
            choices=list(FORMATS),
            nargs="+",
            action="extend",
            default=[],
            help="One or more of: "
            + "; ".join(f"{name} ({format.file})" for name, format in FORMATS.items())
            + ". state_dict if not given. Deep networks take minutes as onnx.",
        )
        parser.add_argument(
            "--image_size",
            type=tuple[int, int] | None,
            default=None,
            help="[height, width] of the images; null for those of the data.",
        )

    def check_own_arguments(self) -> None:
        """Check that what is asked for is possible."""
        for name in ("to", "ckpt_path"):
            if self.config[name] is None:
                raise ValueError(
                    f"--{name} is needed: knl export --config FILE --ckpt_path best --to DIRECTORY; the checkpoint may"
                    " be 'last', 'best' or a file"
                )
        self.config.format = self.config.format or ["state_dict"]
        check_request(Path(self.config.to), self.config.format)
        for side in self.config.image_size or ():
            check_number("image_size", side, at_least=1)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make none: the devices that the run was trained on need not be there."""

    def execute(self) -> None:
        """Export the network."""
        if not isinstance(self.model, Task):
            raise ValueError(f"model: {type(self.model).__name__} is no task of knlightning.tasks, with a backbone")
        if self.checkpoint is not None:
            stored = read_checkpoint(self.checkpoint)
            self.model.load_state_dict(stored["state_dict"])
            if data := stored.get(type(self.datamodule).__qualname__):  # the names of the classes
                self.datamodule.load_state_dict(data)
        preprocessing = preprocessing_of(
            self.datamodule, isinstance(self.model, SegmentationTask), self.config.image_size
        )
        if "image_size" not in preprocessing:
            raise ValueError(
                f"data: {type(self.datamodule).__name__} has no image_size: give --image_size '[height, width]'"
            )
        height, width = preprocessing["image_size"]
        to = Path(self.config.to)
        differences = export(self.model.backbone, to, self.config.format, (height, width), preprocessing)
        for file, difference in differences.items():
            print(f"{to / file}: largest difference from the network {difference:.2g}")
        print(to / PREPROCESSING)


main = ExportCLI
