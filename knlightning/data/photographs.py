"""Patches of the photographs that come with scikit-image and scikit-learn: natural images that need no download."""

import torch
from torch import Tensor

from knlightning.data.in_memory import ImageDataModule
from knlightning.data.transforms import random_crop, random_horizontal_flip
from knlightning.protocols import batch_independent

SIZE = 32
"""Height and width of a patch."""
MAX_PATCHES = 160
"""Patches that are taken of a photograph at most."""


class PhotographsDataModule(ImageDataModule):
    """2474 patches of 16 photographs, whose class is the photograph; 1856 to train on and 618 to test on.

    A photograph is cut into patches of 32x32 pixels that do not overlap, of which the 160 with the most contrast are
    used, or all if they are fewer. A quarter of these, drawn at random, are test images: no pixel is both trained and
    tested on. The split is always the same. Each channel of a patch gets a random mean, and the patch a random
    contrast, so that its mean colour does not tell the class.

    While training, patches are shifted by up to four pixels and mirrored at random. Needs scikit-image
    (`pip install 'knlightning[photographs]'`).

    Arguments are those of `ImageDataModule`.
    """

    class_names = (
        "astronaut", "brick", "camera", "cat", "china", "coffee", "coins", "flower", "grass", "gravel",
        "hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket", "stereo_motorcycle",
    )  # fmt: skip
    # of the training images
    mean = (0.5011, 0.4979, 0.5034)
    std = (0.2026, 0.1932, 0.1953)
    image_size = (SIZE, SIZE)

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return uint8 images `(1856 or 618, 3, 32, 32)` and their labels.

        Raises:
            ValueError: If scikit-image is not installed.
        """
        generator = torch.Generator().manual_seed(0)
        images, labels = [], []
        for label, name in enumerate(self.class_names):
            pixels = read_photograph(name)
            patches = pixels.unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE).flatten(0, 1)
            contrasts = patches.float().std((2, 3)).mean(1)
            chosen = contrasts.argsort(descending=True, stable=True)[:MAX_PATCHES]
            chosen = chosen[torch.randperm(len(chosen), generator=generator)]
            patches = recoloured(patches[chosen], generator)
            num_test = len(patches) // 4
            images.append(patches[num_test:] if train else patches[:num_test])
            labels.append(torch.full((len(images[-1]),), label))
        return torch.cat(images), torch.cat(labels)

    @batch_independent()
    def augmentation(self, images: Tensor) -> Tensor:
        """Shift each image by up to four pixels, and mirror half of them."""
        return random_horizontal_flip(random_crop(images, padding=4))


def read_photograph(name: str) -> Tensor:
    """Read a photograph that lies in the installed package of scikit-image or scikit-learn.

    Args:
        name: Name of the photograph.

    Returns:
        Pixels, uint8 `(H, W, 3)`; of a grey photograph the channels are equal.

    Raises:
        ValueError: If scikit-image is not installed.
    """
    # here: slow to import
    from sklearn.datasets import load_sample_image

    try:
        import skimage.data
    except ModuleNotFoundError as error:
        raise ValueError(
            "The photographs come with scikit-image, which is missing: pip install 'knlightning[photographs]'."
        ) from error
    photograph = load_sample_image(f"{name}.jpg") if name in ("china", "flower") else getattr(skimage.data, name)()
    if name == "stereo_motorcycle":
        photograph = photograph[0]  # the left one of the pair
    pixels = torch.from_numpy(photograph.copy())
    return pixels if pixels.ndim == 3 else pixels.unsqueeze(-1).expand(-1, -1, 3)


def recoloured(patches: Tensor, generator: torch.Generator) -> Tensor:
    """Give each channel of each patch a random mean, 64 to 192, and each patch a random contrast, 0.5 to 1.25 times.

    Args:
        patches: uint8 `(N, 3, H, W)`.
        generator: Source of the random numbers.

    Returns:
        Tensor of the same shape and dtype.
    """
    means = torch.empty(len(patches), 3, 1, 1).uniform_(64, 192, generator=generator)
    contrasts = torch.empty(len(patches), 1, 1, 1).uniform_(0.5, 1.25, generator=generator)
    pixels = patches.float()
    return ((pixels - pixels.mean((2, 3), keepdim=True)) * contrasts + means).round_().clamp_(0, 255).to(torch.uint8)
