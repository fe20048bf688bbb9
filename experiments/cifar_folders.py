"""Write images of CIFAR-10 as folders: many of five classes to train on first, and a few of the others to fine-tune on.

    python experiments/cifar_folders.py --root FOLDER --to FOLDER

FOLDER/first has the training images of five classes, and FOLDER/second a few of each of the other five; both have test
images as val. What was learned on the first is then taken to classes that it did not see, as with images of one's own.
"""

from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

from knlightning.commands.command import command
from knlightning.data import CIFAR10DataModule

FIRST = ("airplane", "bird", "cat", "frog", "truck")


def write(root: str, to: str, few: int = 40, val: int = 200) -> None:
    """Write the folders, and print how many images lie in each.

    Args:
        root: Folder with `cifar-10-batches-py`.
        to: Folder to make.
        few: Images of each class to fine-tune on.
        val: Test images of each class.
    """
    data = CIFAR10DataModule(root)
    for train in (True, False):
        images, labels = data.read(train)
        for label, name in enumerate(data.class_names):
            count = val if not train else None if name in FIRST else few
            folder = Path(to, "first" if name in FIRST else "second", "train" if train else "val", name)
            folder.mkdir(parents=True)
            for index in torch.nonzero(labels == label).flatten()[:count].tolist():
                to_pil_image(images[index]).save(folder / f"{index}.png")
    for part in ("first", "second"):
        print(part, *(f"{where} {len(list(Path(to, part, where).glob('*/*')))}" for where in ("train", "val")))


if __name__ == "__main__":
    command(write, "python experiments/cifar_folders.py")
