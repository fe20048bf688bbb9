"""Clipped sums of the gradients of samples, to which DP-SGD adds its noise."""

from typing import Literal

import torch
from torch import Tensor, nn

from knlightning.privacy.per_sample import PerSampleGradients

Clipping = Literal["flat", "automatic"]
"""How the norm of a sample's gradient is bounded; see `clipping_weights`."""
MARGIN = 1e-4
"""By how much of itself a gradient is clipped below the bound, for the rounding of its norm."""


def clipping_weights(norms: Tensor, max_grad_norm: float, clipping: Clipping) -> Tensor:
    """Compute the factors of the samples' gradients; 0 where a gradient is not finite.

    Args:
        norms: Norms of the gradients [N].
        max_grad_norm: Bound on the norms after clipping, above 0.
        clipping: "flat" scales the gradients down whose norm is above the bound (Abadi et al., 2016); "automatic"
            scales each to the bound, over its norm + 0.01 (Bu et al., 2023).

    Returns:
        Float tensor [N].
    """
    bound = max_grad_norm * (1.0 - MARGIN)
    weights = (bound / norms).clamp(max=1.0) if clipping == "flat" else bound / (norms + 0.01)
    return torch.where(norms.isfinite(), weights, 0.0)


class ClippedSum:
    """Sum the clipped gradients of the samples of a step, one micro-batch after the other.

    Watches the network from now on; see `knlightning.privacy.PerSampleGradients`. Their gradients do not reach
    the parameters' `grad` until `set_gradients`.

    Args:
        module: The network, with its trainable parameters as they are to be trained.
        max_grad_norm: Bound on the norm of a sample's gradient, above 0.
        clipping: As in `clipping_weights`.
        views: Number of views of each sample, whose gradients are averaged before they are clipped.

    Attributes:
        norms: Norms of the gradients that were added last, before they were clipped.

    Raises:
        ValueError: If there is no exact rule for a layer with trainable parameters.
    """

    norms: Tensor

    def __init__(self, module: nn.Module, max_grad_norm: float, clipping: Clipping, views: int = 1) -> None:
        self.max_grad_norm = max_grad_norm
        self.clipping: Clipping = clipping
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self._gradients = PerSampleGradients(module, "sum", views)  # the scale is that of `add`
        self._gradients.attach()

    @property
    def sensitivity(self) -> float:
        """The largest norm of what a sample contributes to the vector of `pop`."""
        return self.max_grad_norm

    def add(self, scale: float, num_samples: int | None = None) -> None:
        """Clip and add the gradients of the last backward pass.

        Args:
            scale: By what to multiply a sample's part in the gradient of the loss to get its own gradient.
            num_samples: Number of samples that were given to the network; None if it need not be checked.

        Raises:
            RuntimeError: If the layers were given another number of samples.
        """
        self.norms = norms = self._gradients.norms() * scale
        if num_samples not in (None, len(norms)):
            raise RuntimeError(
                f"privacy: the layers of the network were given {len(norms)} samples, and the training step"
                f" {num_samples}: each sample must be one row in every layer, for each row contributes up to the bound"
            )
        self._gradients.accumulate(clipping_weights(norms, self.max_grad_norm, self.clipping) * scale)

    def pop(self) -> Tensor:
        """Return the sum as one vector, and begin anew; zero for what no sample has reached.

        Returns:
            Float64 vector; on the CPU for devices without float64.
        """
        parts = []
        for parameter in self.parameters:
            total = getattr(parameter, "summed_grad", None)
            parts.append(torch.zeros_like(parameter).flatten() if total is None else total.flatten())
            parameter.summed_grad = None  # type: ignore[attr-defined] # made by PerSampleGradients
        total = torch.cat(parts)
        return (total if total.device.type == "cuda" else total.cpu()).double()

    def set_gradients(self, vector: Tensor) -> None:
        """Give the parameters their parts of a vector as `grad`, for the optimizer."""
        parts = vector.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))

    def close(self) -> None:
        """Leave the network as it was."""
        self._gradients.detach()
        for parameter in self.parameters:
            if hasattr(parameter, "summed_grad"):
                del parameter.summed_grad
