"""ImageNet (ILSVRC 2012), from its folders.

Source: O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015.
"""

import re
from pathlib import Path

from torchvision.models import ResNet18_Weights

from knlightning.data.folder import abbreviated
from knlightning.data.image_files import ImageFiles
from knlightning.data.image_folder import ImageFolderDataModule
from knlightning.data.imagenet_archives import ARCHIVES, NUM_CLASSES, find_flat


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet: 1,281,167 training and 50,000 validation images in 1000 classes; the latter serve for testing too.

    Reads `ROOT/{train,val}/<wnid>/*.JPEG`, folders that `knl prepare-imagenet` makes of the official archives. Labels
    follow the sorted WordNet ids, as those of torchvision's networks do. EXIF data are ignored, as for published
    results. All else, arguments too, is as in `ImageFolderDataModule`.
    """

    class_names = tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    upright = False

    def load(self, split: str) -> ImageFiles:
        """List the files of a split, as `ImageFolderDataModule` does.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If images lie in it without folders of classes, too.
        """
        where = self.root / split
        if flat := find_flat(where):
            raise ValueError(
                f"{where.absolute()}: {len(flat)} validation images lie there without folders of classes: "
                f"{abbreviated(flat)}. `knl prepare-imagenet` moves them into folders, by the labels in "
                f"{ARCHIVES['devkit'].file}."
            )
        if not where.is_dir():
            raise FileNotFoundError(
                f"There is no folder {where.absolute()}. Images are looked for in ROOT/train/CLASS and ROOT/val/CLASS; "
                "give another root. `knl prepare-imagenet` unpacks the official archives into such folders."
            )
        return super().load(split)

    def name_classes(self, folders: list[str], where: Path) -> tuple[str, ...]:
        """Return the English names of the classes.

        Raises:
            ValueError: If there are other folders than those of 1000 WordNet ids.
        """
        strange = [name for name in folders if not re.fullmatch(r"n\d{8}", name)]
        if strange or len(folders) != NUM_CLASSES:
            among = f", among them {abbreviated(strange)}" if strange else ""
            raise ValueError(
                f"{where.absolute()}: ImageNet has {NUM_CLASSES} folders named by WordNet ids such as n01440764; found "
                f"{len(folders)}{among}. `knl prepare-imagenet` makes them of the official archives. For other images"
                " in folders there is ImageFolderDataModule."
            )
        return type(self).class_names
