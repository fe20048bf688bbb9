"""Cityscapes: streets, with a label for each pixel.

Source: M. Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016. Classes, ids and
colours are those of the benchmark.
"""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torchvision.transforms import v2

from knlightning.checks import check, check_number
from knlightning.data.base import Scaling
from knlightning.data.folder import abbreviated, find_images
from knlightning.data.labelled_files import IMAGENET_MEAN, IMAGENET_STD
from knlightning.data.mask_transforms import PadRightBottom, RandomScale
from knlightning.data.masked_files import MaskedFiles
from knlightning.data.samplers import Sampling
from knlightning.data.segmentation import IGNORED, SegmentationDataModule

IMAGE_SUFFIX, LABEL_SUFFIX = "_leftImg8bit.png", "_gtFine_labelIds.png"

CLASSES = {
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}
"""Name and colour of the classes that count, by the id in files, in the order of the labels to train on."""

# ids are 0 to 33, and -1 for licence plates, which is 255 in a file of 8 bits; those of no class above do not count
LABEL_OF_ID = dict.fromkeys((*range(34), 255), IGNORED) | {number: n for n, number in enumerate(CLASSES)}


class CityscapesDataModule(SegmentationDataModule):
    """Cityscapes with fine labels: 2975 training and 500 validation images of 2048x1024 pixels, 19 classes.

    Reads `ROOT/leftImg8bit/<split>/<city>/<name>_leftImg8bit.png` and
    `ROOT/gtFine/<split>/<city>/<name>_gtFine_labelIds.png`, in the order of the paths. Ids of other classes than the
    19 are made 255, which does not count.

    A training image is scaled by a random factor, padded on the right and at the bottom with black pixels that do not
    count where it is smaller than the crop, cropped at random, and mirrored with probability 1/2: the recipe of Table 3
    of the kernel normalization paper. Factors are those of the public HRNet segmentation code that the paper trained
    with, 0.5, 0.6, ..., 2.1; the paper names the interval from 0.5 to 2 (`scale_range: [0.5, 2.0]`, and
    `scale_step: null` for any factor in it). How an image is augmented is a function of the run's seed, the epoch and
    the image alone, so that runs are equal with any number of processes, and when resumed. An epoch's last batch is
    left out if it is not full.

    Evaluation is on whole images. **The validation images serve for testing too**: the labels of the test images are
    not public, and their files say "not labelled" throughout. Predictions for the benchmark are made on the test images
    by `knl predict`.

    Before a stage begins, a label file of the same size is looked for beside every image, and label files are checked
    for unknown ids. The latter decodes them all; it takes about 11 s of one core for 1000 files of 2048x1024, shared
    among threads and the processes that train together.

    Args:
        root: Folder in which `leftImg8bit` and `gtFine` lie.
        crop_size: `(height, width)` of training images.
        scale_range: Least and largest factor by which training images are scaled.
        scale_step: Distance between the factors that are drawn from; None for any factor in the range.
        check_labels: Whether label files are checked for unknown ids before a stage begins; if not, a file that has
            some is an error when it is read.
        skip_damaged: Whether an image that cannot be read, or whose label file cannot, is skipped, and counted in a
            warning at the end of an epoch; in training, the next one takes its place, but in private training none
            does. If not, it is an error.
        batch_size: Training images in a batch, on each device.
        eval_batch_size: The same for validation and test; None for `batch_size`. Above 1 images must have one size.
            Predictions are made one image at a time.
        scaling: `unit` divides pixels by 255; `standard` then subtracts ImageNet's mean and divides by its standard
            deviation.
        predict_dir: Folder of images to predict on, at their own size; None for `ROOT/leftImg8bit/test`.
        kwargs: Arguments of `BaseDataModule`. `val_split` holds out the same share of each city. The images held out
            show streets near those trained on; other cities are harder.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    class_names = tuple(name for name, _ in CLASSES.values())
    palette = tuple(colour for _, colour in CLASSES.values())
    label_ids = tuple(CLASSES)
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    image_size = (1024, 2048)

    sampling = Sampling(test="val", drop_last=True)

    def __init__(
        self,
        root: str | os.PathLike[str],
        crop_size: tuple[int, int] = (512, 1024),
        scale_range: tuple[float, float] = (0.5, 2.1),
        scale_step: float | None = 0.1,
        check_labels: bool = True,
        skip_damaged: bool = False,
        *,
        batch_size: int = 8,
        eval_batch_size: int | None = 1,
        scaling: Scaling = "standard",
        predict_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            batch_size=batch_size, eval_batch_size=eval_batch_size, scaling=scaling, predict_dir=predict_dir, **kwargs
        )
        sizes_ok = len(crop_size) == 2 and min(crop_size) >= 1
        check(sizes_ok, "crop_size", crop_size, "a height and a width of at least 1")
        low, high = scale_range
        check(0 < low <= high < float("inf"), "scale_range", scale_range, "two factors above 0, the smaller one first")
        check_number("scale_step", scale_step, above=0, none="any factor in scale_range")
        self.root = Path(root)
        self.check_labels, self.skip_damaged = check_labels, skip_damaged
        self.augmentation = v2.Compose(
            [
                RandomScale(low, high, scale_step),
                PadRightBottom(crop_size),
                v2.RandomCrop(crop_size),
                v2.RandomHorizontalFlip(),
            ]
        )
        if predict_dir is None:
            self.predict_dir = self.root / "leftImg8bit" / "test"

    def load(self, split: str) -> MaskedFiles:
        """List the files of a split, and check them.

        Raises:
            FileNotFoundError: If folders or label files are missing.
            ValueError: If there are no images, a label file has another size than its image or unknown ids, or a file
                is no image. Messages name the files.
        """
        folder = self.root / "leftImg8bit" / split
        if not folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder {folder.absolute()}. Images are looked for in ROOT/leftImg8bit/{split}/CITY and "
                f"their labels in ROOT/gtFine/{split}/CITY; give another root."
            )
        images = [path for path in find_images(folder) if path.endswith(IMAGE_SUFFIX)]
        if not images:
            raise ValueError(f"There are no images CITY/*{IMAGE_SUFFIX} in {folder.absolute()}.")
        labelled = self.root / "gtFine" / split
        names = [os.path.relpath(path, folder).removesuffix(IMAGE_SUFFIX) + LABEL_SUFFIX for path in images]
        if missing := [name for name in names if not (labelled / name).is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(images)} images in {folder.absolute()} have no label file in "
                f"{labelled.absolute()}: {abbreviated(missing)}. Unpack gtFine_trainvaltest.zip again, or remove these "
                "images."
            )
        cities = {city: number for number, city in enumerate(dict.fromkeys(map(os.path.dirname, names)))}
        files = MaskedFiles(
            images,
            [str(labelled / name) for name in names],
            LABEL_OF_ID,
            self.augmentation,
            torch.tensor([cities[os.path.dirname(name)] for name in names]),
            max(1, self._num_readers()),
            self.skip_damaged,
        )
        if self.check_labels:
            rank_zero_info(f"Checking the labels of {len(files)} images in {labelled} (check_labels).")
            ranks, rank = self._ranks()
            files.check_masks(range(rank, len(files), ranks))
        return files
