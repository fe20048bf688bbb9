"""The ImageNet weights that the authors of kernel normalization publish."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, Weights, WeightsEnum

from knlightning.checkpoint_files import read_checkpoint
from knlightning.nn import KNConv2d

CODE = "https://github.com/reza-nasirigerdeh/norm-torch"
"""Repository of the authors, whose README links the files."""
IMAGENET = "imagenet1k_norm_torch"
"""What `weights` and `init_from` call these weights."""


class PublishedWeights(WeightsEnum):
    """Published weights as torchvision describes its own: `url`, `transforms` and `meta`, with recipe and accuracy.

    The authors publish no checksum. So a file is trusted for the names and shapes in it alone, and read without running
    code from it.
    """

    @property
    def file(self) -> Path:
        """Where the file lies once it is downloaded, in the cache of `torch.hub`."""
        return Path(torch.hub.get_dir(), "checkpoints", self.meta["file"])

    def get_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the weights by their published names; they are downloaded if they are not there.

        Raises:
            OSError: If they cannot be downloaded.
            ValueError: If the file is damaged.
        """
        if not self.file.is_file():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(self.url, str(self.file))
                read_checkpoint(self.file, "meta")  # and not a page that says why there is no file
            except (OSError, ValueError) as error:
                self.file.unlink(missing_ok=True)
                raise OSError(
                    f"{self.file.name} cannot be downloaded ({error}). Download it where there is a network, from"
                    f" {self.url} or by the links of {CODE}, and put it at {self.file}"
                ) from error
        content: dict[str, Any] = read_checkpoint(self.file)
        return content


def _weights(depth: int, identifier: str, num_params: int, accuracy: float) -> Weights:
    return Weights(
        # how Google Drive gives a file by its identifier, also one that is too large for it to look for viruses in
        url=f"https://drive.usercontent.google.com/download?id={identifier}&export=download&confirm=t",
        transforms=ResNet18_Weights.IMAGENET1K_V1.transforms,
        meta={
            "file": f"knresnet{depth}_imagenet.pth",
            "sha256": None,  # not published
            "num_params": num_params,
            "categories": ResNet18_Weights.IMAGENET1K_V1.meta["categories"],
            "recipe": f"{CODE}; here configs/imagenet_knresnet{depth}.yaml",
            "_metrics": {"ImageNet-1K": {"acc@1": accuracy}},
            "_docs": "Table 2 of Nasirigerdeh et al. (TMLR 2024).",
        },
    )


class KNResNet18_Weights(PublishedWeights):  # noqa: N801 # as torchvision names them
    """Weights of `knlightning.models.knresnet18`."""

    IMAGENET1K_NORM_TORCH = _weights(18, "1oU4IGxErW4l-oqY6vn8V1DL0dBMt1KUO", 11_685_220, 71.17)


class KNResNet34_Weights(PublishedWeights):  # noqa: N801 # as torchvision names them
    """Weights of `knlightning.models.knresnet34`."""

    IMAGENET1K_NORM_TORCH = _weights(34, "1dn1O_JHcAP_6gQgvSe5ojV_WzDOB7Lvk", 21_792_830, 74.60)


class KNResNet50_Weights(PublishedWeights):  # noqa: N801 # as torchvision names them
    """Weights of `knlightning.models.knresnet50`."""

    IMAGENET1K_NORM_TORCH = _weights(50, "1CSP4HQTQWaR0q2Pdf4GyPfMj6TDE6E2J", 25_556_390, 76.54)


def norm_torch_names(model: nn.Module) -> dict[str, str]:
    """Map the published names of a model's parameters to the names here.

    Args:
        model: A kernel normalized `knlightning.models.KNResNet`.

    Returns:
        Names here by published name, in the order of the published files.

    Raises:
        ValueError: If the model is another.
    """
    stages, tail = getattr(model, "stages", None), getattr(model, "tail", None)
    if not isinstance(stages, nn.ModuleList) or not any(isinstance(layer, KNConv2d) for layer in model.modules()):
        raise ValueError('published weights are those of knresnet18, 34 and 50 with norm="kernel"')
    pairs = [("block0.0", "stem.0")]
    count = 0
    for i, stage in enumerate(stages):
        if i > 0:
            pairs.append(
                (_published(model, f"trans_block{i}.conv", f"transitions.{i - 1}.1"), f"transitions.{i - 1}.1")
            )
        for j, block in enumerate(stage.children()):
            count += 1
            for k in (k for k in (1, 2, 3) if hasattr(block, f"conv{k}")):
                ours = f"stages.{i}.{j}.conv{k}"
                pairs.append((_published(model, f"res_block{count}.conv{k}", ours), ours))
    if isinstance(tail, nn.Sequential):
        pairs.append(("conv_block_f.conv", "tail.2"))
    pairs.append(("fc", "fc"))
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in pairs for kind in ("weight", "bias")}


def _published(model: nn.Module, name: str, ours: str) -> str:
    """Append what the published code calls a 1x1 convolution, which it wraps."""
    weight = model.get_submodule(ours).weight
    return f"{name}.conv1x1" if isinstance(weight, Tensor) and weight.shape[-1] == 1 else name
