"""Cityscapes: streets, with a label for each pixel.

Source: M. Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016. Classes, ids and
colours are those of the benchmark.
"""

import os
from pathlib import Path
from typing import Any

import torch

from knlightning.data.folder import abbreviated, find_images
from knlightning.data.masked_files import MaskedFiles, MaskedFilesDataModule
from knlightning.data.samplers import Sampling
from knlightning.data.segmentation import IGNORED

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


class CityscapesDataModule(MaskedFilesDataModule):
    """Cityscapes with fine labels: 2975 training and 500 validation images of 2048x1024 pixels, 19 classes.

    Reads `ROOT/leftImg8bit/<split>/<city>/<name>_leftImg8bit.png` and
    `ROOT/gtFine/<split>/<city>/<name>_gtFine_labelIds.png`, in the order of the paths. Ids of other classes than the
    19 are made 255, which does not count.

    Training images are augmented as `MaskedFilesDataModule` says: the recipe of Table 3 of the kernel normalization
    paper. Factors are those of the public HRNet segmentation code that the paper trained with, 0.5, 0.6, ..., 2.1; the
    paper names the interval from 0.5 to 2 (`scale_range: [0.5, 2.0]`, and `scale_step: null` for any factor in it).

    **The validation images serve for testing too**: the labels of the test images are not public, and their files say
    "not labelled" throughout. Predictions for the benchmark are made on the test images by `knl predict`.

    Args:
        root: Folder in which `leftImg8bit` and `gtFine` lie.
        predict_dir: Folder of images to predict on, at their own size; None for `ROOT/leftImg8bit/test`.
        kwargs: Arguments of `MaskedFilesDataModule`. `val_split` holds out the same share of each city. The images held
            out show streets near those trained on; other cities are harder.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    class_names = tuple(name for name, _ in CLASSES.values())
    palette = tuple(colour for _, colour in CLASSES.values())
    label_ids = tuple(CLASSES)
    image_size = (1024, 2048)
    sampling = Sampling(test="val", drop_last=True)

    def __init__(
        self, root: str | os.PathLike[str], *, predict_dir: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(predict_dir=predict_dir, **kwargs)
        self.root = Path(root)
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
        strata = torch.tensor([cities[os.path.dirname(name)] for name in names])
        return self.masked(images, [str(labelled / name) for name in names], LABEL_OF_ID, labelled, strata)
