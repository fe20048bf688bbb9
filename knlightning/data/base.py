"""What all datamodules share: loaders, scaling, held out images, prediction on a folder of the user's images."""

import os
import warnings
from abc import ABC, abstractmethod
from itertools import zip_longest
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tv

from knlightning.checks import ArgumentError, check, check_choice, check_number
from knlightning.data.datasets import LabelledImages, TensorImages
from knlightning.data.folder import FolderImages, abbreviated
from knlightning.data.loader import EvalLoader, ResumableLoader, drops_last, num_readers
from knlightning.data.samplers import EvalSampler, Sampling
from knlightning.data.splitting import say_chosen_on, stratified_split
from knlightning.protocols import batch_independent

Scaling = Literal["unit", "standard"]


class BaseDataModule(LightningDataModule, ABC):
    """Base of all datamodules.

    Training batches are `(images, labels)`, those for prediction `(images, paths)`. Loaders give uint8 images, which
    are scaled to float as soon as a batch is on its device. The order of the training images is a function of the
    seed (`seed_everything`; 0 if it was not called) and the epoch alone. The names of the classes go into
    checkpoints, and come back from there for predictions.

    A subclass sets the class attributes `class_names`, `mean`, `std` and `image_size`, overrides `load`, and hands its
    keyword arguments on; `sampling` is set where its splits have other names or are sampled in another way. For images
    that fit into memory there is `ImageDataModule`, for images with a label for each pixel `SegmentationDataModule`.

    Args:
        batch_size: Training images in a batch, on each device.
        eval_batch_size: The same for validation, test and prediction; None for `batch_size`.
        scaling: `unit` divides pixels by 255, as kernel normalized networks take them; `standard` then subtracts the
            mean and divides by the standard deviation of the dataset.
        val_split: Fraction of the training images, 0 to below 1, held out for validation with the same share of each
            class. With 0 the validation images of the dataset serve for it, or **its test images where it has no
            others**; what is then chosen by validation accuracy (a learning rate, the best epoch) is chosen on the
            test set.
        split_seed: Seed of that split; independent of the run's seed, so that runs share the split.
        num_workers: Processes that read image files, for each device; None for the number of processors, 16 at most.
        pin_memory: Whether batches are put into page-locked memory; None if training on a CUDA device.
        drop_last: Whether a last training batch that is not full is left out; None for what `sampling` says, but a
            single image is left out if the network has batch normalization, which needs more.
        balanced_sampling: Whether an epoch draws its training images, as many as there are, so that each class comes
            equally often on average; images of rare classes come several times, and others not at all.
        predict_dir: Folder of images to predict on; see `FolderImages`. Read when predicting only.

    Attributes:
        class_names: Names of the classes in the order of the labels.
        mean: Mean of each channel, pixels scaled to 0 to 1.
        std: Standard deviation likewise.
        image_size: `(height, width)` of the images of evaluation, and of those of `predict_dir` unless they keep their
            size.
        sampling: Which splits are used, and how they are sampled.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    sampling = Sampling()

    def __init__(
        self,
        *,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        scaling: Scaling = "unit",
        val_split: float = 0.0,
        split_seed: int = 0,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        drop_last: bool | None = None,
        balanced_sampling: bool = False,
        predict_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        check_number("batch_size", batch_size, at_least=1, integer=True)
        check_number("eval_batch_size", eval_batch_size, at_least=1, integer=True, none="batch_size")
        check_choice("scaling", scaling, get_args(Scaling))
        check_number("val_split", val_split, at_least=0, below=1)
        check_number("split_seed", split_seed, at_least=0, at_most=2**32 - 1, integer=True)
        check_number("num_workers", num_workers, at_least=0, integer=True, none="the number of processors")
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
        self.drop_last = drop_last
        self.balanced_sampling = balanced_sampling
        self.predict_dir = predict_dir
        self._train_images: LabelledImages | None = None
        self._eval_images: dict[str, LabelledImages] = {}  # by their split
        self._predict_images: FolderImages | None = None
        self._restored_seed = 0

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @abstractmethod
    def load(self, split: str) -> LabelledImages:
        """Return the images of a split, checked. Called once for each split that a stage needs.

        Args:
            split: One of the names in `sampling`.
        """

    def _load(self, split: str) -> LabelledImages:
        """`load` by its earlier name, for programs that call it."""
        return self.load(split)

    def hold_out(self, train: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
        """Split the training images into those to train on and those held out for validation.

        Args:
            train: What `load` returned.

        Raises:
            ArgumentError: If they cannot be split by `val_split`.
        """
        return stratified_split(train, self.val_split, self.split_seed)

    def load_predict(self, folder: str | os.PathLike[str]) -> FolderImages:
        """Return the images of a folder, in the form for evaluation. Those that cannot be read are left out, and told.

        Args:
            folder: `predict_dir`.
        """
        return FolderImages(folder, self.image_size, skip_damaged=True)

    def setup(self, stage: str) -> None:
        """Read what a stage needs, unless it was read before.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            ValueError: If the data are damaged, the split cannot be made, or `predict_dir` is not given or unusable.
            FileNotFoundError: If the data or `predict_dir` do not exist.
        """
        if stage == "predict":
            if self.predict_dir is None:
                raise ArgumentError("predict_dir", None, "the folder of the images to predict on")
            self._predict_images = self.load_predict(self.predict_dir)
            return
        held_out = self.val_split > 0
        evaluated = self.sampling.test if stage == "test" else self._validation
        if self._train_images is None and (stage == "fit" or (held_out and evaluated == self._validation)):
            train = self.load(self.sampling.train)
            if held_out:
                train, self._eval_images[self._validation] = self.hold_out(train)
            self._train_images = train
        if stage == "test" and evaluated == self._validation:
            say_chosen_on(evaluated)
        if evaluated not in self._eval_images:
            self._eval_images[evaluated] = self.load(evaluated)
        self._eval_images[evaluated].check_eval_batch_size(self.eval_batch_size)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled training batches of `(images, labels)`.

        Raises:
            ArgumentError: If there would be none: a batch that is not full is left out, and there are fewer images.
        """
        dataset = self._train_images
        if dataset is None:
            raise RuntimeError("The training images are not read yet: call setup('fit') first.")
        seed = self._seed()
        trainer = self.trainer
        # Lightning tells the sampler one epoch too many after resuming at the end of an epoch with max_steps set; its
        # current_epoch is right
        current_epoch = None if trainer is None else lambda: trainer.current_epoch
        workers = self._workers(dataset)
        sampling = self.sampling
        strata = dataset.strata if self.balanced_sampling else None
        sampler = dataset.train_sampler(len(dataset), seed, *self._ranks(), current_epoch, sampling.repeats, strata)
        drop_last = drops_last(self.drop_last, sampling, len(sampler), self.batch_size, trainer)
        check(
            not drop_last or self.batch_size <= len(sampler),
            "batch_size",
            self.batch_size,
            f"at most {len(sampler)}, the number of training images for each process",
            "A batch that is not full is left out, and none would remain.",
        )
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
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
        return self._eval_dataloader(self._validation)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches of `(images, labels)`."""
        return self._eval_dataloader(self.sampling.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of `(images, paths)` of the images in `predict_dir`; single images where they keep their size."""
        images = self._predict_images
        if images is None:
            raise RuntimeError("There are no images to predict on yet: call setup('predict') first.")
        return self._ordered(images, 1 if images.size is None else self.eval_batch_size)

    @batch_independent()
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

    @batch_independent("prepared")
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
        """Return what checkpoints keep: the seed of the order of training images, names of classes and of a split."""
        return {"seed": self._seed(), "class_names": list(self.class_names), "validated_on": self._validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what only a checkpoint holds.

        That is the seed of the run, for the case that `seed_everything` was not called, and the names of the classes,
        unless labelled images were read, which say themselves what their classes are called. If the run was validated
        on images that now are the test images, that is said.
        """
        self._restored_seed = state_dict["seed"]
        tested = self.sampling.test if self.trainer is not None and self.trainer.testing else None
        if tested is not None and tested == state_dict.get("validated_on") != self._validation:
            say_chosen_on(tested)  # by this configuration they are others, of which `setup` says nothing
        names = tuple(state_dict.get("class_names", self.class_names))
        if self._train_images is None and not self._eval_images:
            self.class_names = names
        elif names != self.class_names:
            differing = [f"{a!r} ({b!r})" for a, b in zip_longest(names, self.class_names) if a != b]
            warnings.warn(
                f"Names of classes in the checkpoint (in the data): {abbreviated(differing)}. "
                "Unless they mean the same, the predictions of the network are wrong.",
                stacklevel=2,
            )

    @property
    def _validation(self) -> str:
        """Name of the split that is validated on."""
        train = "the images" if self.sampling.train == "." else self.sampling.train
        return self.sampling.val if self.val_split == 0 else f"held out of {train}"

    def _eval_dataloader(self, split: str) -> DataLoader[Any]:
        if split not in self._eval_images:
            raise RuntimeError(f"The {split} images are not read yet: call setup('validate' or 'test') first.")
        return self._ordered(self._eval_images[split], self.eval_batch_size)

    def _ordered(self, dataset: LabelledImages | FolderImages, batch_size: int) -> EvalLoader:
        ranks, rank = self._ranks()
        workers = self._workers(dataset)
        return EvalLoader(
            dataset,
            batch_size=batch_size,
            sampler=EvalSampler(len(dataset), ranks, rank) if ranks > 1 else None,
            num_workers=workers,
            collate_fn=dataset.collate,
            pin_memory=self._pin(),
            generator=torch.Generator(),  # evaluation leaves the global generator alone
            persistent_workers=workers > 0,
        )

    def _seed(self) -> int:
        """Return the seed that `seed_everything` was called with; otherwise that of the resumed run, or 0."""
        return int(os.environ.get("PL_GLOBAL_SEED", self._restored_seed))

    def _ranks(self) -> tuple[int, int]:
        """Return the number of processes that train or evaluate together, and the number of this one."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _workers(self, dataset: LabelledImages | FolderImages) -> int:
        return 0 if isinstance(dataset, TensorImages) else self._num_readers()

    def _num_readers(self) -> int:
        """Return how many processes read files."""
        if self.num_workers is not None:
            return self.num_workers
        return num_readers(1 if self.trainer is None else self.trainer.num_devices)

    def _pin(self) -> bool:
        if self.pin_memory is None:
            return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return self.pin_memory
