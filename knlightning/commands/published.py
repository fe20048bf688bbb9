"""Weights alone as checkpoints: files without a run."""

from lightning.pytorch import LightningModule
from torch import nn

from knlightning.commands.output import say
from knlightning.models.weights import load_weights


def load_published(model: LightningModule, weights: str) -> None:
    """Bring weights into the network of a task; all of them must fit.

    Args:
        model: The task, with its network as `backbone`.
        weights: The file, or the name of published weights.

    Raises:
        ValueError: If they are those of another network.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"--ckpt_path {weights} holds weights alone, and a {type(model).__name__} has no backbone")
    loaded = load_weights(backbone, weights, whole=True)
    say(f"{weights} holds weights, without a run ({loaded}); all else is as configured.")
