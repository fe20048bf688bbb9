"""The published results in image classification and segmentation, and what each of them takes.

Source: Nasirigerdeh et al. (TMLR 2024): Tables 1 to 8, section 5, and Appendices B to D.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from knlightning.analysis.settings import BACKBONE, BATCH_SIZE, DROPOUT, LEARNING_RATE, NORM, Value

Table = Literal["1", "2", "3", "4", "convnext", "cifar10", "ablation"]
Scale = Literal["paper", "tiny"]

TITLES: dict[Table, str] = {
    "1": "Table 1: test accuracy on CIFAR-100 against the batch size",
    "2": "Table 2: top-1 accuracy on ImageNet",
    "3": "Table 3: mean IoU / pixel accuracy / mean accuracy of the classes on Cityscapes",
    "4": "Table 4: top-1 accuracy on ImageNet 32x32 with differential privacy, at epsilon 8 and delta 8e-7",
    "convnext": "Section 5: ConvNeXt-Tiny on ImageNet, top-1 accuracy",
    "cifar10": "Section 5: test accuracy on CIFAR-10 of the networks of Figure 7",
    "ablation": "Section 5: KNResNet-50 on CIFAR-100 without KernelNorm (`none`), and with it but without dropout"
    " (`kernel`); with both in Table 1",
}

START = 0.2
"""The learning rate at which the paper's search on CIFAR-100 begins; it halves it until the best has been passed."""


@dataclass(frozen=True)
class Row:
    """A published result and the run that reproduces it.

    Args:
        table: Where the paper reports it.
        config: Name of the configuration file, without `.yaml`.
        norm: Normalization of the network.
        batch_size: Images in a step of the optimizer, on all devices together.
        learning_rate: Initial learning rate.
        accuracy: Published top-1 accuracy on the test images (ImageNet: the validation images) in %; of several runs
            their mean.
        sd: Its standard deviation over the runs, None where there is a single run.
        settings: What differs from the configuration file.
        further: Of segmentation the pixel accuracy and the mean accuracy of the classes, each with its standard
            deviation.
    """

    table: Table
    config: str
    norm: str
    batch_size: int
    learning_rate: float
    accuracy: float
    sd: float | None = None
    settings: Mapping[str, Value] = field(default_factory=dict)
    further: tuple[tuple[float, float], ...] = ()

    @property
    def backbone(self) -> str:
        """The network, by the name of its function in `knlightning.models`."""
        named = str(self.settings.get(BACKBONE, "")).rpartition(".")[2]
        return named or self.config.split("_", 1)[1].removesuffix("_dp")

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
        """The published accuracies in %, with their standard deviation if there is one."""
        numbers = ((self.accuracy, self.sd), *self.further)
        return " / ".join(f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}" for mean, sd in numbers)

    @property
    def command(self) -> str:
        """The command that reproduces the row."""
        batch_size = f" --batch_size {self.batch_size}" if self.table == "1" else ""
        return f"knl reproduce --table {self.table} --backbone {self.backbone} --norm {self.norm}{batch_size}"


# For batch sizes 2, 32 and 256: mean and standard deviation of the accuracy, and k, where the best learning rate is
# START / 2**k. (The paper prints two of them with another last digit: 0.000390626 and 0.000195313.)
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
# mean IoU, pixel accuracy and mean accuracy, each with its standard deviation, for 18, 34 and 50 layers
_TABLE_3 = {
    "layer": (
        ((59.10, 0.46), (92.42, 0.17), (69.43, 0.58)),
        ((60.19, 0.32), (92.73, 0.17), (70.12, 0.33)),
        ((57.88, 0.84), (92.31, 0.21), (68.25, 0.75)),
    ),
    "group": (
        ((62.33, 0.52), (93.23, 0.01), (71.58, 0.55)),
        ((64.21, 0.58), (93.59, 0.07), (74.32, 0.49)),
        ((62.14, 0.68), (93.34, 0.04), (71.66, 0.64)),
    ),
    "local_context": (
        ((62.25, 0.67), (92.99, 0.06), (71.59, 0.68)),
        ((64.75, 0.38), (93.31, 0.09), (74.25, 0.37)),
        ((64.03, 0.02), (93.07, 0.14), (73.40, 0.03)),
    ),
    "batch": (
        ((63.90, 0.06), (93.77, 0.02), (73.15, 0.14)),
        ((66.94, 0.34), (94.27, 0.03), (76.50, 0.41)),
        ((65.19, 0.50), (93.98, 0.03), (74.65, 0.62)),
    ),
    "kernel": (
        ((64.37, 0.14), (93.73, 0.01), (73.46, 0.12)),
        ((67.61, 0.17), (94.13, 0.05), (76.58, 0.19)),
        ((68.02, 0.13), (94.22, 0.04), (77.03, 0.05)),
    ),
}
_TABLE_4 = {"layer": 20.81, "group": 20.99, "kernel": 22.01}
_CIFAR10 = zip(_NORMS, (0.05, 0.05, 0.1, 0.1), (90.32, 90.58, 92.11, 93.27), strict=True)


def _family(norm: str) -> str:
    return "knresnet" if norm == "kernel" else "resnet"


ROWS: tuple[Row, ...] = (
    *(
        Row(
            "1",
            f"cifar100_{backbone}",
            norm,
            size,
            START / 2**k,
            mean,
            sd,
            {NORM: norm, BATCH_SIZE: size, LEARNING_RATE: START / 2**k},
        )
        for (backbone, norm), results in _TABLE_1.items()
        for size, (mean, sd, k) in zip((2, 32, 256), results, strict=True)
    ),
    *(
        Row("2", f"imagenet_{_family(norm)}{depth}", norm, 256, 0.1, accuracy, settings={NORM: norm})
        for depth, accuracies in _TABLE_2.items()
        for norm, accuracy in zip(_NORMS, accuracies, strict=True)
    ),
    *(
        Row("3", f"cityscapes_fcn_{_family(norm)}{depth}", norm, 16, 0.01, *miou, {NORM: norm}, tuple(further))
        for place, depth in enumerate((18, 34, 50))
        for norm, results in _TABLE_3.items()
        for miou, *further in (results[place],)
    ),
    *(
        Row("4", f"imagenet32_{_family(norm)}18_dp", norm, 8192, 4.0, accuracy, settings={NORM: norm})
        for norm, accuracy in _TABLE_4.items()
    ),
    Row("convnext", "imagenet_convnext_tiny", "layer", 1024, 0.001, 80.87),
    Row("convnext", "imagenet_knconvnext_tiny", "kernel", 1024, 0.001, 81.25),
    *(
        Row("cifar10", f"cifar10_{_family(norm)}18", norm, 128, lr, accuracy, settings={NORM: norm, LEARNING_RATE: lr})
        for norm, lr, accuracy in _CIFAR10
    ),
    # the paper does not state the learning rate of the ablation: that of the whole network
    Row("ablation", "cifar100_knresnet50", "none", 32, 0.025, 71.48, settings={NORM: "none"}),
    Row("ablation", "cifar100_knresnet50", "kernel", 32, 0.025, 78.32, settings={DROPOUT: 0.0}),
)

TIMES = {
    18: {"batch": (328, 4), "batch-primitives": (466, 4), "kernel": (838, 7)},
    34: {"batch": (552, 5), "batch-primitives": (766, 5), "kernel": (1635, 12)},
    50: {"batch": (803, 6), "batch-primitives": (1429, 10), "kernel": (2373, 19)},
}
"""Table 6: seconds of training and of inference for an epoch of ImageNet, on 8 A40 with 32 images each."""
MEMORY = {
    18: {"batch": 3.2, "batch-primitives": 3.7, "kernel": 7.2},
    34: {"batch": 3.6, "batch-primitives": 4.4, "kernel": 9.4},
    50: {"batch": 5.7, "batch-primitives": 8.2, "kernel": 13.6},
}
"""Table 7: GB in training on ImageNet, on an RTX A6000 with 32 images."""
SCALING = {
    1: {32: (2.44, 2.80), 64: (8.43, 4.94), 128: (33.45, 13.44)},
    2: {32: (0.64, 2.24), 64: (1.07, 2.72), 128: (2.91, 4.59)},
    3: {32: (0.58, 2.16), 64: (0.79, 2.40), 128: (1.71, 3.28)},
}
"""Table 8: seconds of inference and GB of four KNConv layers by stride, and by height and width of the images."""

_SMALL = {"resnet18": "resnet8", "knresnet18": "knresnet8", "knresnet50": "knresnet8"}
_FEW = {"trainer.max_epochs": 3, "trainer.limit_train_batches": 12, "pictures.every_n_epochs": 0}
_NOT_TINY = {
    *((table, norm, size) for table, size in (("1", 2), ("1", 256), ("2", 256)) for norm in ("layer", "group")),
    *(("3", norm, 16) for norm in ("layer", "group", "local_context")),
    ("4", "layer", 8192),
}
"""What is left out in miniature, to save time."""


def rows_of(table: Table, scale: Scale = "paper") -> list[Row]:
    """Return the rows of a table; to those of the ablation belongs the whole network, which is in Table 1.

    Args:
        table: Where the paper reports them.
        scale: "tiny" for the rows in miniature, of which there are fewer.
    """
    whole = ("1", "knresnet50", 32) if table == "ablation" else ()
    rows = [row for row in ROWS if row.table == table or (row.table, row.backbone, row.batch_size) == whole]
    return rows if scale == "paper" else list({row.name: row for row in map(tiny, rows[::-1]) if row}.values())[::-1]


def tiny(row: Row) -> Row | None:
    """Return a row in miniature: a small network trains for three epochs on a few of the digits of scikit-learn.

    Returns:
        It, with another configuration and other settings; None for deeper and preactivated networks, and a few more.
    """
    if (row.table, row.norm, row.batch_size) in _NOT_TINY:
        return None
    settings: dict[str, Value] = {BACKBONE: "", NORM: row.norm, **row.settings, **_FEW}
    kernel = "kn" in row.backbone
    if row.table == "3" and row.backbone.endswith("18"):
        settings |= {BACKBONE: f"knlightning.models.fcn_{'kn' if kernel else ''}resnet8", BATCH_SIZE: 8}
        return replace(row, config="scenes_fcn_knresnet", batch_size=8, settings=settings)
    if row.table == "convnext":
        settings |= {BACKBONE: f"knlightning.models.{row.backbone}", BATCH_SIZE: 8, "trainer.max_epochs": 1}
        del settings[NORM]
        return replace(row, config="digits_resnet8", batch_size=8, settings=settings)
    if row.backbone not in _SMALL:
        return None
    size = min(row.batch_size, 256)
    settings |= {BACKBONE: f"knlightning.models.{_SMALL[row.backbone]}", BATCH_SIZE: size}
    settings["data.init_args.scaling"] = "unit" if kernel else "standard"
    if row.table == "4":
        return replace(row, config="digits_dp", batch_size=size, settings=settings)
    settings[LEARNING_RATE] = (0.032 if kernel else 0.004) * (size / 32) ** 0.5
    if size < 32:
        settings["trainer.limit_train_batches"] = 30
    return replace(row, config="digits_resnet8", batch_size=size, settings=settings)
