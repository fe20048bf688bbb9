"""Published weights as checkpoints: files without a run."""

from pathlib import Path

from lightning.pytorch import LightningModule

from knlightning.commands.output import say
from knlightning.models import KNResNet, load_norm_torch_weights


def load_published(model: LightningModule, weights: Path) -> None:
    """Bring published weights into the network of a task.

    Args:
        model: The task; its `backbone` must be one of the networks whose weights are published.
        weights: The file.

    Raises:
        ValueError: If it is another network.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, KNResNet):
        raise ValueError(
            f"--ckpt_path {weights} holds weights alone, which can be those of a published"
            " knlightning.models.knresnet18, 34 or 50; model.init_args.backbone is another network, a"
            f" {type(backbone).__name__}"
        )
    load_norm_torch_weights(backbone, weights)
    say(f"{weights} holds published weights, without a run; all else is as configured.")
