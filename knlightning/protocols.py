"""What tasks, callbacks and commands read from a datamodule, a task or a callback.

All of it is optional: a LightningDataModule, LightningModule or Callback of your own works without it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn


def stretched(images: Tensor) -> Tensor:
    """Bring images (N, C, H, W) of an unknown scaling to [0, 1], each by itself."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-12)


@dataclass(frozen=True)
class DataDescription:
    """What tasks, callbacks and commands read from a datamodule; None for what it lacks, and they do without.

    Empty names, palettes and label ids are None too, and so are 0 classes: data that are not read yet have them.

    Attributes:
        class_names: Names of the classes in the order of the labels.
        num_classes: Their number; the network must have as many outputs.
        image_size: Height and width of the images of evaluation, in pixels.
        scaling: "unit" for pixels in [0, 1]; "standard" if `mean` is then subtracted and the result divided by `std`.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel, likewise.
        predict_dir: Folder of the images to predict on; predictions lie in the run as the images lie in it.
        hparams: Its arguments. Of these `eval_resize` is read: the length in pixels to which the shorter side of an
            image is brought before `image_size` is cut out of its middle.
        palette: Red, green and blue of each class, 0 to 255, if there is one for each pixel.
        label_ids: Number of each class in the files of a benchmark, likewise.
        displayable: Method that brings scaled images (N, C, H, W) back to [0, 1], for pictures; `stretched` where the
            datamodule has none.
    """

    class_names: Sequence[str] | None = None
    num_classes: int | None = None
    image_size: tuple[int, int] | None = None
    scaling: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    predict_dir: Path | None = None
    hparams: Mapping[str, Any] | None = None
    palette: Sequence[tuple[int, int, int]] | None = None
    label_ids: Sequence[int] | None = None
    displayable: Callable[[Tensor], Tensor] = stretched

    def names(self, num_classes: int) -> Sequence[str]:
        """Return the names of the classes; their numbers if the datamodule does not name exactly so many."""
        if self.class_names is not None and len(self.class_names) == num_classes:
            return self.class_names
        return [str(number) for number in range(num_classes)]


def describe(datamodule: object) -> DataDescription:
    """Read what a datamodule says of its data. This is the only place that reads it.

    Args:
        datamodule: With any of the attributes of `DataDescription`; None if there is none.
    """
    given: dict[str, Any] = {field.name: getattr(datamodule, field.name, None) for field in fields(DataDescription)}
    for name in ("class_names", "palette", "label_ids"):
        if given[name] is not None and not len(given[name]):
            given[name] = None
    if given["predict_dir"] is not None:
        given["predict_dir"] = Path(given["predict_dir"])
    given["num_classes"] = given["num_classes"] or None
    given["displayable"] = given["displayable"] or stretched
    return DataDescription(**given)


def data_of(trainer: Trainer) -> DataDescription:
    """Describe the data that a trainer is given."""
    return describe(trainer.datamodule)  # type: ignore[attr-defined] # set where mypy does not look


def has_batch_norm(network: nn.Module) -> bool:
    """Say whether a network has batch normalization, which cannot be trained on a single image."""
    types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(layer, types) for layer in network.modules())


@runtime_checkable
class KeepsLedger(Protocol):
    """A callback that makes a training private, and counts what it spends.

    Attributes:
        ledger: What was spent.
    """

    @property
    def ledger(self) -> Any: ...


@runtime_checkable
class ChecksBefore(Protocol):
    """A callback that can refuse a run before any data are read; `knl fit` calls it."""

    def check_before(
        self, trainer: Trainer, pl_module: LightningModule, datamodule: LightningDataModule | None
    ) -> None:
        """Check the run.

        Raises:
            ValueError: If the callback does not fit the run.
        """


Function = TypeVar("Function", bound=Callable[..., Any])
_CALLS = "_batch_independent_calls"


def batch_independent(*calls: str) -> Callable[[Function], Function]:
    """Mark a method of data that treats each sample of a batch by itself: private training then gives it whole batches.

    What is not marked gets the samples one by one, so that it cannot mix them, which takes longer. The mark is that of
    this very method: a method of a subclass that overrides it has none.

    Args:
        calls: Names of the methods of the same object that it calls, and that a subclass may override. The mark holds
            only where they are marked too.
    """

    def mark(function: Function) -> Function:
        setattr(function, _CALLS, calls)
        return function

    return mark


def is_batch_independent(function: Any, owner: object = None) -> bool:
    """Say whether a function, and all that it calls of its owner, are marked by `batch_independent`."""
    calls: tuple[str, ...] | None = getattr(function, _CALLS, None)
    return calls is not None and all(is_batch_independent(getattr(owner, name, None), owner) for name in calls)
