"""The published results in image classification, and what each of them takes.

Source: Nasirigerdeh et al. (TMLR 2024): Tables 1, 2, 4 and 5, section 5, and Appendices B and C.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from knlightning.analysis.trials import BATCH_SIZE, DROPOUT, NORM, RATE, Value

Table = Literal["1", "2", "4", "convnext", "cifar10", "ablation"]

TITLES: dict[Table, str] = {
    "1": "Table 1: test accuracy on CIFAR-100 against the batch size",
    "2": "Table 2: top-1 accuracy on ImageNet",
    "4": "Table 4: top-1 accuracy on ImageNet 32x32 with differential privacy, at epsilon 8 and delta 8e-7",
    "convnext": "Section 5: ConvNeXt-Tiny on ImageNet, top-1 accuracy",
    "cifar10": "Section 5: test accuracy on CIFAR-10 of the networks of Figure 7",
    "ablation": "Section 5: KNResNet-50 on CIFAR-100 without KernelNorm (`none`), and with it but without dropout"
    " (`kernel`); with both in Table 1",
}

START_RATE = 0.2
"""The learning rate at which the paper's search on CIFAR-100 begins; it halves it until the best has been passed."""


@dataclass(frozen=True)
class Row:
    """A published result and the run that reproduces it.

    Args:
        table: where the paper reports it.
        config: name of the configuration file, without `.yaml`.
        norm: normalization of the network.
        batch_size: images in a step of the optimizer, on all devices together.
        rate: initial learning rate.
        accuracy: published top-1 accuracy on the test images (ImageNet: the validation images) in %, where there are
            several runs their mean.
        sd: its standard deviation over the runs, None where there is a single run.
        settings: what differs from the configuration file.
    """

    table: Table
    config: str
    norm: str
    batch_size: int
    rate: float
    accuracy: float
    sd: float | None = None
    settings: Mapping[str, Value] = field(default_factory=dict)

    @property
    def backbone(self) -> str:
        """The network, by the name of its function in `knlightning.models`."""
        return self.config.split("_", 1)[1].removesuffix("_dp")

    @property
    def path(self) -> Path:
        """The configuration file, in the directory of the project."""
        return Path("configs", f"{self.config}.yaml")

    @property
    def name(self) -> str:
        """What tells the row from all others."""
        return f"{self.table}-{self.backbone}-{self.norm}-batch{self.batch_size}"

    @property
    def published(self) -> str:
        """The published accuracy in %, with its standard deviation if there is one."""
        return f"{self.accuracy:.2f}" if self.sd is None else f"{self.accuracy:.2f} ± {self.sd:.2f}"

    @property
    def command(self) -> str:
        """The command that reproduces the row."""
        batch_size = f" --batch_size {self.batch_size}" if self.table == "1" else ""
        return f"knl reproduce --table {self.table} --backbone {self.backbone} --norm {self.norm}{batch_size}"


# For batch sizes 2, 32 and 256: mean and standard deviation of the accuracy, and k, where the best learning rate is
# START_RATE / 2**k. (Two of the rates are printed with a last digit that differs from this: 0.000390626, 0.000195313.)
_TABLE_1 = {
    ("resnet18", "layer"): ((72.68, 0.22, 7), (73.17, 0.16, 4), (71.99, 0.45, 2)),
    ("preact_resnet18", "layer"): ((73.51, 0.10, 7), (73.36, 0.15, 4), (72.91, 0.07, 2)),
    ("resnet18", "group"): ((74.62, 0.12, 7), (74.46, 0.05, 3), (74.46, 0.08, 1)),
    ("preact_resnet18", "group"): ((74.82, 0.24, 7), (74.74, 0.44, 3), (74.62, 0.36, 1)),
    ("resnet18", "batch"): ((72.11, 0.25, 8), (78.52, 0.20, 3), (77.72, 0.04, 0)),
    ("preact_resnet18", "batch"): ((72.57, 0.19, 8), (78.32, 0.09, 3), (77.83, 0.16, 0)),
    ("knresnet18", "kernel"): ((79.10, 0.10, 7), (79.29, 0.02, 2), (78.84, 0.10, 0)),
    ("resnet34", "layer"): ((73.74, 0.26, 7), (73.88, 0.37, 4), (72.48, 0.57, 2)),
    ("preact_resnet34", "layer"): ((74.79, 0.13, 7), (74.34, 0.42, 4), (73.10, 0.42, 2)),
    ("resnet34", "group"): ((75.76, 0.14, 7), (75.72, 0.06, 3), (75.44, 0.27, 1)),
    ("preact_resnet34", "group"): ((75.82, 0.05, 7), (75.85, 0.28, 3), (75.76, 0.25, 1)),
    ("resnet34", "batch"): ((73.06, 0.23, 8), (79.21, 0.09, 3), (78.27, 0.19, 1)),
    ("preact_resnet34", "batch"): ((72.20, 0.19, 9), (79.09, 0.03, 3), (78.59, 0.24, 0)),
    ("knresnet34", "kernel"): ((79.28, 0.09, 7), (79.53, 0.15, 2), (79.16, 0.21, 0)),
    ("resnet50", "layer"): ((75.83, 0.25, 8), (75.74, 0.14, 4), (74.37, 0.58, 2)),
    ("preact_resnet50", "layer"): ((74.28, 0.31, 7), (74.57, 0.32, 4), (73.41, 0.15, 2)),
    ("resnet50", "group"): ((77.03, 0.62, 8), (77.02, 0.08, 4), (74.79, 0.14, 2)),
    ("preact_resnet50", "group"): ((75.67, 0.27, 7), (76.08, 0.18, 3), (75.52, 0.13, 1)),
    ("resnet50", "batch"): ((71.02, 0.15, 9), (80.39, 0.06, 4), (77.89, 0.06, 1)),
    ("preact_resnet50", "batch"): ((70.83, 0.41, 10), (80.28, 0.15, 4), (78.88, 0.21, 0)),
    ("knresnet50", "kernel"): ((80.24, 0.18, 7), (80.18, 0.10, 3), (80.09, 0.26, 0)),
}
# LayerNorm, GroupNorm, BatchNorm (ResNet) and KernelNorm (KNResNet)
_NORMS = ("layer", "group", "batch", "kernel")
_TABLE_2 = {18: (68.34, 68.93, 70.28, 71.17), 34: (71.64, 72.63, 73.99, 74.60), 50: (73.80, 75.92, 76.41, 76.54)}
_TABLE_4 = {"layer": 20.81, "group": 20.99, "kernel": 22.01}
_CIFAR10 = zip(_NORMS, (0.05, 0.05, 0.1, 0.1), (90.32, 90.58, 92.11, 93.27), strict=True)


def _family(norm: str) -> str:
    return "knresnet" if norm == "kernel" else "resnet"


ROWS: tuple[Row, ...] = (
    *(
        Row("1", f"cifar100_{backbone}", norm, size, rate, mean, sd, {NORM: norm, BATCH_SIZE: size, RATE: rate})
        for (backbone, norm), results in _TABLE_1.items()
        for size, (mean, sd, k) in zip((2, 32, 256), results, strict=True)
        for rate in (START_RATE / 2**k,)
    ),
    *(
        Row("2", f"imagenet_{_family(norm)}{depth}", norm, 256, 0.1, accuracy, settings={NORM: norm})
        for depth, accuracies in _TABLE_2.items()
        for norm, accuracy in zip(_NORMS, accuracies, strict=True)
    ),
    *(
        Row("4", f"imagenet32_{_family(norm)}18_dp", norm, 8192, 4.0, accuracy, settings={NORM: norm})
        for norm, accuracy in _TABLE_4.items()
    ),
    Row("convnext", "imagenet_convnext_tiny", "layer", 1024, 0.001, 80.87),
    Row("convnext", "imagenet_knconvnext_tiny", "kernel", 1024, 0.001, 81.25),
    *(
        Row("cifar10", f"cifar10_{_family(norm)}18", norm, 128, rate, accuracy, settings={NORM: norm, RATE: rate})
        for norm, rate, accuracy in _CIFAR10
    ),
    # of the ablation the rate is not told: that of the whole network
    Row("ablation", "cifar100_knresnet50", "none", 32, 0.025, 71.48, settings={NORM: "none"}),
    Row("ablation", "cifar100_knresnet50", "kernel", 32, 0.025, 78.32, settings={DROPOUT: 0.0}),
)
