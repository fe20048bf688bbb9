"""Clipped sums of the gradients of samples, to which DP-SGD adds its noise."""

import math
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
        metrics_share: Share of the squared sensitivity for two more values of each sample: whether it is clipped, and
            whether it is classified correctly; 0 for none. See `knlightning.privacy.private_metrics`.

    Attributes:
        norms: Norms of the gradients that were added last, before they were clipped.

    Raises:
        ValueError: If there is no exact rule for a layer with trainable parameters.
    """

    norms: Tensor

    def __init__(
        self, module: nn.Module, max_grad_norm: float, clipping: Clipping, views: int = 1, metrics_share: float = 0.0
    ) -> None:
        self.max_grad_norm, self.metrics_share = max_grad_norm, metrics_share
        self._metrics = torch.zeros(2 if metrics_share else 0, dtype=torch.float64)
        self.clipping: Clipping = clipping
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self._gradients = PerSampleGradients(module, "sum", views)  # the scale is that of `add`
        self._gradients.attach()

    @property
    def sensitivity(self) -> float:
        """The largest norm of what a sample contributes to the vector of `pop`."""
        return self.max_grad_norm / math.sqrt(1.0 - self.metrics_share)

    @property
    def _metrics_scale(self) -> float:
        """The two values are 1 at most, and together have their share of the squared sensitivity."""
        return self.sensitivity * math.sqrt(self.metrics_share / 2)

    def add(self, scale: float, num_samples: int | None = None, correct: Tensor | None = None) -> None:
        """Clip and add the gradients of the last backward pass.

        Args:
            scale: By what to multiply a sample's part in the gradient of the loss to get its own gradient.
            num_samples: Number of samples that were given to the network; None if it need not be checked.
            correct: Float tensor [N] of [0, 1], whether the samples are classified correctly; None if it is not known.

        Raises:
            RuntimeError: If the layers were given another number of samples.
        """
        self.norms = norms = self._gradients.norms() * scale
        if num_samples not in (None, len(norms)):
            raise RuntimeError(
                f"privacy: the layers of the network were given {len(norms)} samples, and the training step"
                f" {num_samples}: each sample must be one row in every layer, for each row contributes up to the bound"
            )
        if self.metrics_share:
            clipped = (norms > self.max_grad_norm).float()
            values = torch.stack([clipped, torch.zeros_like(clipped) if correct is None else correct.to(clipped)])
            self._metrics += values[:, norms.isfinite()].sum(1).cpu()
        for parameter in self.parameters:  # float32 would round a large sum by more than MARGIN
            if getattr(parameter, "summed_grad", None) is None:
                dtype = parameter.dtype if parameter.device.type == "mps" else torch.float64
                parameter.summed_grad = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)  # type: ignore[attr-defined] # its own
        self._gradients.accumulate(clipping_weights(norms, self.max_grad_norm, self.clipping) * scale)

    def pop(self) -> Tensor:
        """Return the sum as one vector, and begin anew; zero for what no sample has reached.

        Returns:
            Float64 vector, with the two values at its end if they have a share; on the CPU for devices without float64.
        """
        parts = []
        for parameter in self.parameters:
            total = getattr(parameter, "summed_grad", None)
            parts.append(torch.zeros_like(parameter).flatten() if total is None else total.flatten())
            parameter.summed_grad = None  # type: ignore[attr-defined] # its own
        total = torch.cat(parts)
        total = (total if total.device.type == "cuda" else total.cpu()).double()
        metrics = (self._metrics * self._metrics_scale).to(total)
        self._metrics.zero_()
        return torch.cat((total, metrics))

    def set_gradients(self, vector: Tensor) -> Tensor:
        """Give the parameters their parts of a vector as `grad`, for the optimizer.

        Args:
            vector: As by `pop`, with noise, and divided by the number of samples in a step.

        Returns:
            The shares of samples that are clipped, and classified correctly; empty if they were not asked for.
        """
        *parts, metrics = vector.split([*(parameter.numel() for parameter in self.parameters), len(self._metrics)])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))
        return metrics / self._metrics_scale if self.metrics_share else metrics

    def close(self) -> None:
        """Leave the network as it was."""
        self._gradients.detach()
        for parameter in self.parameters:
            if hasattr(parameter, "summed_grad"):
                del parameter.summed_grad
