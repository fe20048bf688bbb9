"""A stratified split of a dataset."""

from typing import TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info

from knlightning.checks import ArgumentError
from knlightning.data.datasets import LabelledImages

Images = TypeVar("Images", bound=LabelledImages)


def stratified_split(dataset: Images, val_split: float, split_seed: int) -> tuple[Images, Images]:
    """Split a dataset into the images to train on and those held out, with the same share of each stratum.

    Args:
        dataset: The images.
        val_split: Fraction of them that is held out, above 0 and below 1.
        split_seed: Seed of the split.

    Returns:
        Both subsets, each in the order of the dataset.

    Raises:
        ArgumentError: If a stratum has a single image, or a subset would have fewer images than there are strata.
    """
    from sklearn.model_selection import train_test_split  # here: slow to import

    try:
        subsets = train_test_split(
            range(len(dataset)), test_size=val_split, random_state=split_seed, stratify=dataset.strata.numpy()
        )
    except ValueError as error:
        raise ArgumentError(
            "val_split", val_split, f"a fraction by which the {len(dataset)} training images can be split", f"{error}"
        ) from error
    train, held_out = (dataset.take(torch.tensor(sorted(indices))) for indices in subsets)
    return train, held_out


def say_chosen_on(split: str) -> None:
    """Say that the test images are those that the run was validated on.

    Args:
        split: Their name.
    """
    rank_zero_info(
        f"Test images: the same as for validation ({split!r}). What was chosen by a score of validation, such as the"
        " best epoch, was chosen on them."
    )
