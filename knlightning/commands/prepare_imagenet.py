"""Unpack ImageNet's archives into folders of classes.

knl prepare-imagenet --archives DOWNLOADS --root IMAGENET
"""

from functools import partial
from pathlib import Path

from knlightning.commands.command import command
from knlightning.commands.output import say
from knlightning.data.imagenet_archives import ARCHIVES, unpack


def prepare_imagenet(archives: Path, root: Path) -> None:
    """Unpack the official archives of ImageNet into folders of classes, which ImageNetDataModule reads.

    ILSVRC2012_img_train.tar becomes ROOT/train, and ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz ROOT/val,
    whichever of the two is there. Archives are checked by size and MD5 sum, folders by their number of images. After
    an interrupt the same command goes on. Validation images that lie in ROOT/val without folders are moved into
    folders; that needs the devkit alone.

    Args:
        archives: Folder of the archives. They stay there.
        root: Folder to unpack into; it takes about 155 GB.

    Raises:
        FileNotFoundError: If there is nothing to unpack and nothing to check, or the devkit is missing.
        ValueError: If an archive is damaged, or a folder that is there is not complete.
    """
    splits = [name for name in ("train", "val") if (archives / ARCHIVES[name].file).exists() or (root / name).exists()]
    if not splits:
        files = " or ".join(ARCHIVES[name].file for name in ("train", "val"))
        raise FileNotFoundError(f"There is no {files} in {archives.absolute()}, and no images in {root.absolute()}.")
    for split in splits:
        unpack(split, archives, root, say)


main = partial(command, prepare_imagenet, "knl prepare-imagenet")
