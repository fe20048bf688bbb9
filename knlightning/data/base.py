"""What all datamodules share: splits, loaders, scaling, prediction on a folder of one's own images."""

import copy
import os
import warnings
from abc import ABC, abstractmethod
from itertools import zip_longest
from typing import Any, Literal, Self, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tv

from knlightning.data.folder import FolderImages, collate_named, listed
from knlightning.data.loader import ResumableLoader
from knlightning.data.samplers import EvalSampler, TrainSampler

Scaling = Literal["unit", "standard"]
HELD_OUT = "held out"
MOST_WORKERS = 16


class LabelledImages(Dataset[Any], ABC):
    """Images with labels, of which a part can be taken."""

    @property
    @abstractmethod
    def strata(self) -> Tensor:
        """Number of the group each image belongs to, int64 `(N,)`; a split keeps the shares of the groups."""

    def __len__(self) -> int:
        return len(self.strata)

    @abstractmethod
    def take(self, rows: Tensor) -> Self:
        """Return a part, without copying images.

        Args:
            rows: Numbers of its images, int64.
        """

    @staticmethod
    @abstractmethod
    def collate(samples: Any) -> tuple[Tensor, Tensor]:
        """Make a batch, uint8 images `(N, C, H, W)` and their labels, of what is read for its numbers."""


class TensorImages(LabelledImages):
    """Images and labels held in memory, read a whole batch at a time.

    Processes that a DataLoader starts share the images: those that are forked have them from the process they come
    from, others are given them in shared memory. The datamodules start none: to cut a batch out of the images takes
    less time than to send it from one process to another.

    Args:
        images: uint8 `(N, C, H, W)`.
        labels: int64 `(N,)`; or uint8 `(N, H, W)`, one for each pixel, and then a split is not stratified.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.rows = torch.arange(len(images))

    @property
    def strata(self) -> Tensor:
        return self.labels if self.labels.ndim == 1 else torch.zeros(len(self.labels), dtype=torch.int64)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[self.rows[index]], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch: `(images, labels)`; DataLoader calls this with the indices of a whole batch."""
        chosen = torch.tensor(indices)
        return self.images.index_select(0, self.rows[chosen]), self.labels[chosen]

    def take(self, rows: Tensor) -> Self:
        part = copy.copy(self)
        part.rows, part.labels = self.rows[rows], self.labels[rows]
        return part

    @staticmethod
    def collate(samples: Any) -> tuple[Tensor, Tensor]:
        return samples  # whole batches already


class BaseDataModule(LightningDataModule, ABC):
    """Base of all datamodules.

    Training batches are `(images, labels)`, those for prediction `(images, paths)`. Loaders give uint8 images, which
    are scaled to float as soon as a batch is on its device. The order of the training images is a function of the
    seed (`seed_everything`; 0 if it was not called) and the epoch alone. The names of the classes go into
    checkpoints, and come back from there for predictions.

    Args:
        batch_size: Training images in a batch, on each device.
        eval_batch_size: The same for validation, test and prediction; None for `batch_size`.
        scaling: `unit` divides pixels by 255; `standard` then subtracts the mean and divides by the standard deviation.
        val_split: Fraction of the training images, 0 to below 1, held out for validation with the same share of each
            class.
        split_seed: Seed of that split; independent of the run's seed, so that runs share the split.
        num_workers: Processes that read image files, for each device; None for the processors there are, 16 at most.
        pin_memory: Whether batches are put into page-locked memory; None if training on a CUDA device.
        predict_dir: Folder of images to predict on; see `FolderImages`. Looked at when predicting only.

    Attributes:
        class_names: Names of the classes in the order of the labels.
        mean: Mean of each channel, pixels scaled to 0 to 1.
        std: Standard deviation likewise.
        image_size: `(height, width)` of the images of evaluation, and of those of `predict_dir` where they are brought
            to a size.

    Raises:
        ValueError: An argument is out of range.
    """

    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]

    # what `_load` is asked for: images to train on, to validate with if none are held out, and to test with
    _train, _val, _test = "train", "test", "test"
    # how batches are made of it
    _train_loader: type[ResumableLoader] = ResumableLoader
    _eval_loader: type[DataLoader[Any]] = DataLoader
    _train_sampler: type[TrainSampler] = TrainSampler
    _repeats = 1
    _drop_last = False  # the last training batch, if it is short
    _resize: int | None = None
    _whole = False  # whether images to predict on keep their size, and come one by one for that

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int | None,
        scaling: Scaling,
        val_split: float,
        split_seed: int,
        num_workers: int | None,
        pin_memory: bool | None,
        predict_dir: str | os.PathLike[str] | None,
    ) -> None:
        super().__init__()
        for name, value, allowed, ok in (
            ("batch_size", batch_size, "1 or more", batch_size >= 1),
            (
                "eval_batch_size",
                eval_batch_size,
                "1 or more, or null for batch_size",
                eval_batch_size is None or eval_batch_size >= 1,
            ),
            ("scaling", scaling, " or ".join(get_args(Scaling)), scaling in get_args(Scaling)),
            ("val_split", val_split, "a fraction, 0 <= val_split < 1", 0 <= val_split < 1),
            ("split_seed", split_seed, "0 to 2**32 - 1", 0 <= split_seed < 2**32),
            ("num_workers", num_workers, "0 or more", num_workers is None or num_workers >= 0),
        ):
            if not ok:
                raise ValueError(f"{name}={value!r}: must be {allowed}.")
        self.save_hyperparameters()
        for name, value in self.hparams.items():
            if isinstance(value, os.PathLike):  # checkpoints hold plain values only
                self.hparams[name] = os.fspath(value)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.scaling = scaling
        self.val_split = val_split
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.predict_dir = predict_dir
        self._parts: dict[str, LabelledImages] = {}
        self._predict_images: FolderImages | None = None
        self._restored_seed = 0

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @abstractmethod
    def _load(self, source: str) -> LabelledImages:
        """Return the checked images of one of `_train`, `_val`, `_test`."""

    def setup(self, stage: str) -> None:
        """Read what a stage needs, unless it was read before.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            ValueError: The data are damaged, the split cannot be made, or `predict_dir` is not given or unusable.
            FileNotFoundError: The data or `predict_dir` are not there.
        """
        if stage == "predict":
            if self.predict_dir is None:
                raise ValueError(
                    "predict_dir is not set: give the folder of the images to predict on (--data.predict_dir FOLDER)."
                )
            size = None if self._whole else self.image_size
            self._predict_images = FolderImages(self.predict_dir, size, self._resize)
            return
        held_out = self.val_split > 0
        if (stage == "fit" or (stage == "validate" and held_out)) and self._train not in self._parts:
            train = self._load(self._train)
            if held_out:
                train, self._parts[HELD_OUT] = self._split(train)
            self._parts[self._train] = train
        evaluated = self._test if stage == "test" else self._val
        if (stage == "test" or not held_out) and evaluated not in self._parts:
            self._parts[evaluated] = self._load(evaluated)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled training batches of `(images, labels)`.

        Raises:
            ValueError: There would be none: a short batch is left out, and there are fewer images than one takes.
        """
        dataset = self._part(self._train)
        seed = self._seed()
        trainer = self.trainer
        # Lightning tells the sampler one epoch too many after resuming at the end of an epoch with max_steps set; its
        # current_epoch is right
        current_epoch = None if trainer is None else lambda: trainer.current_epoch
        workers = self._workers(dataset)
        sampler = self._train_sampler(len(dataset), seed, *self._ranks(), current_epoch, self._repeats)
        if self._drop_last and len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: there are {len(sampler)} training images for each process, and a batch "
                "that is not full is left out; no batch would remain. Give a smaller one."
            )
        return self._train_loader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=self._drop_last,
            num_workers=workers,
            collate_fn=dataset.collate,
            pin_memory=self._pin(),
            # the workers' seeds are drawn from this one, not from the global generator: a resumed run starts its
            # workers once more, which may not shift the random numbers of the model
            generator=torch.Generator().manual_seed(seed),
            persistent_workers=workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches of `(images, labels)`."""
        part = self._part(HELD_OUT if self.val_split > 0 else self._val)
        return self._in_order(self._eval_loader, part, part.collate)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches of `(images, labels)`."""
        part = self._part(self._test)
        return self._in_order(self._eval_loader, part, part.collate)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of `(images, paths)` of the images in `predict_dir`."""
        if self._predict_images is None:
            raise RuntimeError("Nothing to predict on yet: call setup('predict') first.")
        return self._in_order(DataLoader, self._predict_images, collate_named)

    def prepared(self, images: Tensor, train: bool) -> Tensor:
        """Scale the images of a batch, on the device where they are.

        Args:
            images: uint8 `(N, C, H, W)`.
            train: Whether they are training images.

        Returns:
            float32 of the same shape.
        """
        images = images.float().div_(255)
        return tv.normalize(images, list(self.mean), list(self.std)) if self.scaling == "standard" else images

    def on_after_batch_transfer(self, batch: tuple[Tensor, Any], dataloader_idx: int) -> tuple[Tensor, Any]:
        """Prepare the images of a batch that has arrived on its device.

        Args:
            batch: uint8 images `(N, C, H, W)`, and labels or paths.
            dataloader_idx: Unused; Lightning gives it.

        Returns:
            Float images, in the trainer's precision, and the rest unchanged.
        """
        images, rest = batch
        if self.trainer is None:
            return self.prepared(images, train=False), rest
        # Lightning converts batches before this hook, when they still are uint8
        return self.trainer.precision_plugin.convert_input(self.prepared(images, self.trainer.training)), rest

    def displayable(self, images: Tensor) -> Tensor:
        """Undo the scaling, for pictures.

        Args:
            images: Scaled images `(..., C, H, W)`.

        Returns:
            float32 of the same shape, clamped to 0 to 1.
        """
        images = images.float()
        if self.scaling == "standard":
            mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
            images = images * std + mean
        return images.clamp(0, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints keep: the seed of the order of training images, and the names of the classes."""
        return {"seed": self._seed(), "class_names": list(self.class_names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take from a checkpoint what it alone knows.

        That is the seed of a run that is resumed, for the case that `seed_everything` gives none, and the names of the
        classes, where no labelled images were read that have names of their own.
        """
        self._restored_seed = state_dict["seed"]
        names = tuple(state_dict.get("class_names", self.class_names))
        if not self._parts:
            self.class_names = names
        elif names != self.class_names:
            differing = [f"{a!r} ({b!r})" for a, b in zip_longest(names, self.class_names) if a != b]
            warnings.warn(
                f"Names of classes in the checkpoint (in the data): {listed(differing)}. "
                "Unless they mean the same, what the network says is wrong.",
                stacklevel=2,
            )

    def _part(self, name: str) -> LabelledImages:
        if name not in self._parts:
            raise RuntimeError(f"The {name} images are not read yet: call setup('fit' or 'test') first.")
        return self._parts[name]

    def _split(self, data: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
        """Return the part to train on and the part held out."""
        from sklearn.model_selection import train_test_split  # here: slow to import

        try:
            parts = train_test_split(
                range(len(data)), test_size=self.val_split, random_state=self.split_seed, stratify=data.strata.numpy()
            )
        except ValueError as error:  # a class of one image, or fewer images than classes in a part
            raise ValueError(
                f"val_split={self.val_split}: the {len(data)} training images in {self.num_classes} classes cannot "
                f"be split so: {error}"
            ) from error
        train, val = (data.take(torch.tensor(sorted(part))) for part in parts)
        return train, val

    def _in_order(
        self, loader: type[DataLoader[Any]], dataset: LabelledImages | FolderImages, collate: Any
    ) -> DataLoader[Any]:
        ranks, rank = self._ranks()
        workers = self._workers(dataset)
        return loader(
            dataset,
            batch_size=1 if self._whole and isinstance(dataset, FolderImages) else self.eval_batch_size,
            sampler=EvalSampler(len(dataset), ranks, rank) if ranks > 1 else None,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self._pin(),
            generator=torch.Generator(),  # evaluation leaves the global generator alone
            persistent_workers=workers > 0,
        )

    def _seed(self) -> int:
        """Return the number `seed_everything` was given; without it that of the resumed run, or 0."""
        return int(os.environ.get("PL_GLOBAL_SEED", self._restored_seed))

    def _ranks(self) -> tuple[int, int]:
        """Return the number of processes that share the work, and the number of this one."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _workers(self, dataset: LabelledImages | FolderImages) -> int:
        return 0 if isinstance(dataset, TensorImages) else self._readers()

    def _readers(self) -> int:
        """Return how many processes read files."""
        if self.num_workers is not None:
            return self.num_workers
        # a container or a batch system may grant fewer than the machine has
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = 1 if self.trainer is None else self.trainer.num_devices
        return max(1, min(MOST_WORKERS, processors // devices))

    def _pin(self) -> bool:
        if self.pin_memory is None:
            return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return self.pin_memory


class ImageDataModule(BaseDataModule):
    """Base of the datamodules for labelled images that fit into memory.

    Training batches are `(images, labels)`, those for prediction `(images, paths)`. Loaders give uint8 images; as
    soon as a batch is on its device, images are augmented (while training only) and scaled to float. The order of
    the training images is a function of the seed (`seed_everything`; 0 if it was not called) and the epoch alone.

    A dataset of one's own is a subclass which says what its classes are called, how its pixels are distributed,
    and how to read it:

        class PetsDataModule(ImageDataModule):
            class_names = ("cat", "dog")
            mean = (0.48, 0.45, 0.40)
            std = (0.23, 0.22, 0.22)
            image_size = (32, 32)

            def read(self, train):
                with numpy.load("pets_train.npz" if train else "pets_test.npz") as file:
                    return torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])

    `read` returns uint8 images `(N, 3, 32, 32)` and int64 labels; with `augmentation` overridden too, the images are
    varied while training.

    Args:
        batch_size: Training images in a batch, on each device.
        eval_batch_size: The same for validation, test and prediction; None for `batch_size`.
        scaling: `unit` divides pixels by 255, as kernel normalized networks take them; `standard` then subtracts the
            mean and divides by the standard deviation of the training images.
        augment: Whether training images are varied at random, in the way of the dataset.
        val_split: Fraction of the training images, 0 to below 1, held out for validation with the same share of each
            class. With 0 **the test images serve for validation**, as in papers that report the accuracy of a fixed
            schedule; what is then chosen by validation accuracy (a rate, the best epoch) is chosen on the test set.
        split_seed: Seed of that split; independent of the run's seed, so that runs share the split.
        num_workers: Processes that read the files in `predict_dir`; images in memory need none.
        pin_memory: Whether batches are put into page-locked memory; None if training on a CUDA device.
        predict_dir: Folder of images to predict on; see `FolderImages`. Looked at when predicting only.

    Attributes:
        class_names: Names of the classes in the order of the labels.
        mean: Mean of each channel, pixels scaled to 0 to 1.
        std: Standard deviation likewise.
        image_size: `(height, width)` to which images of `predict_dir` are brought.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        scaling: Scaling = "unit",
        augment: bool = True,
        val_split: float = 0.0,
        split_seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        predict_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            scaling=scaling,
            val_split=val_split,
            split_seed=split_seed,
            num_workers=num_workers,
            pin_memory=pin_memory,
            predict_dir=predict_dir,
        )
        self.augment = augment

    @abstractmethod
    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read the training images, or the test images.

        Args:
            train: Which of the two.

        Returns:
            Images, uint8 `(N, C, H, W)`, and labels, int64 `(N,)`, 0 to `num_classes - 1`.
        """

    def augmentation(self, images: Tensor) -> Tensor:
        """Vary a batch of training images at random; a subclass says how. Here they stay as they are.

        Args:
            images: uint8 `(N, C, H, W)`, on the device that trains.

        Returns:
            Tensor of the same dtype.
        """
        return images

    def prepared(self, images: Tensor, train: bool) -> Tensor:
        """Augment training images, and scale.

        Args:
            images: uint8 `(N, C, H, W)`, on the device where they are needed.
            train: Whether they are training images.

        Returns:
            float32 of the same shape.
        """
        return super().prepared(self.augmentation(images) if train and self.augment else images, train)

    def _load(self, source: str) -> TensorImages:
        """Read a part, and refuse what would fail, or train on nonsense, later."""
        train = source == self._train
        images, labels = self.read(train)
        where = f"{type(self).__name__}, {'training' if train else 'test'} images"
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(
                f"{where}: uint8 of shape (N, {len(self.mean)}, H, W) is needed, got {images.dtype} of shape "
                f"{tuple(images.shape)}."
            )
        if labels.dtype != torch.int64 or labels.shape != (len(images),) or len(images) == 0:
            raise ValueError(
                f"{where}: one int64 label for each image, and at least one image, is needed; got "
                f"{len(images)} images, labels {labels.dtype} of shape {tuple(labels.shape)}."
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"{where}: labels must be 0 to {self.num_classes - 1}, got {low} to {high}.")
        return TensorImages(images, labels)
