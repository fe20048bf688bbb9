"""The loss of a network around its weights: along random directions, in a ball, and its sharpest curvature.

Source: Li et al., Visualizing the Loss Landscape of Neural Nets (NeurIPS 2018).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
STEP = 1e-8
"""Step of the differences between gradients, relative to the norm of the weights."""


class LossFunction:
    """The mean loss of a network on fixed images, as a function of its weights.

    The network is a copy, in evaluation mode: dropout is off, and batch normalization uses its running statistics.
    These do not follow the weights, as in the code of Li et al.; the statistics of all other norms are those of the
    activations that the moved weights give.

    Args:
        network: From images (N, C, H, W) to logits.
        images: Images, prepared as the network takes them.
        labels: Their labels.
        loss: Mean loss of a batch, of logits and labels.
        batch_size: Images at once.
        device: Where it computes.
        dtype: In which precision.

    Attributes:
        weights: The trained weights of the network, in one vector. Those that are frozen stay as they are.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        loss: Loss = nn.functional.cross_entropy,
        batch_size: int = 256,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network = copy.deepcopy(network).to(device, dtype).eval()
        self.images, self.labels = images.to(device, dtype), labels.to(device)
        self.loss, self.batch_size = loss, batch_size
        self._parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self.weights = self._joined(parameter.detach() for parameter in self._parameters)

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> "LossFunction":
        """Return a copy on another device, or in another precision, around the same weights."""
        self._move(self.weights)
        return LossFunction(self.network, self.images, self.labels, self.loss, self.batch_size, device, dtype)

    @torch.no_grad()
    def __call__(self, weights: Tensor) -> float:
        """Compute the loss."""
        self._move(weights)
        return sum(float(loss) for loss in self._losses())

    def gradient(self, weights: Tensor) -> Tensor:
        """Compute the gradient of the loss by the weights."""
        self._move(weights)
        gradient = torch.zeros_like(self.weights)
        for loss in self._losses():
            gradient += self._joined(torch.autograd.grad(loss, self._parameters, materialize_grads=True))
        return gradient

    def filter_norms(self, vector: Tensor) -> Tensor:
        """Return for each weight the norm of the filter that it belongs to.

        Args:
            vector: As `self.weights`; weights, or a direction.

        Returns:
            A vector of the same shape. The rows of a matrix are its filters. Zero for biases and for the scales and
            shifts of norms, so that these stay as they are, as with Li et al.
        """
        norms = []
        for part, parameter in zip(vector.split(self._sizes), self._parameters, strict=True):
            rows = part.view(len(parameter), -1) if parameter.ndim > 1 else part.new_zeros(1, part.numel())
            norms.append(rows.norm(dim=1, keepdim=True).expand_as(rows))
        return self._joined(norms)

    def random_direction(self, generator: torch.Generator) -> Tensor:
        """Draw a filter-normalized direction: normal, and each filter then gets the norm of the network's filter.

        Args:
            generator: Of random numbers, on the CPU.
        """
        noise = torch.randn(self.weights.shape, generator=generator, dtype=torch.float64).to(self.weights)
        return noise * self.filter_norms(self.weights) / self.filter_norms(noise).clamp(min=1e-30)

    def _losses(self) -> Iterator[Tensor]:
        batches = zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        for images, labels in batches:
            yield self.loss(self.network(images), labels) * (len(images) / len(self.images))

    @torch.no_grad()
    def _move(self, weights: Tensor) -> None:
        for parameter, part in zip(self._parameters, weights.split(self._sizes), strict=True):
            parameter.copy_(part.view_as(parameter))

    @staticmethod
    def _joined(tensors: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])


def use_batch_statistics(network: nn.Module) -> None:
    """Let batch normalization take the statistics of the batch in evaluation too, as other norms take theirs.

    Args:
        network: Is changed in place.
    """
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None


class Trajectory(NamedTuple):
    """How the weights moved in training, in the plane that shows most of it.

    Attributes:
        places: Column and row of each checkpoint; 0, 0 for the last, and at most at a distance of 1.
        explained: Share of the variance along the columns, and along the rows.
    """

    places: list[tuple[float, float]]
    explained: list[float]


def trajectory_plane(weights: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], Trajectory]:
    """Find the first two principal components of the checkpoints of a training (Li et al., section 7).

    Args:
        weights: As `LossFunction.weights`, of three or more checkpoints in their order.

    Returns:
        Directions of the columns and of the rows, and where the checkpoints lie.
    """
    from sklearn.decomposition import PCA  # slow to import

    moved = torch.stack([one - weights[-1] for one in weights]).double().cpu()
    pca = PCA(2, svd_solver="full").fit(moved.numpy())
    directions = torch.from_numpy(pca.components_)
    places = moved @ directions.T
    farthest = places.norm(dim=1).max()
    along, across = (directions * farthest).to(weights[-1])
    return (along, across), Trajectory((places / farthest).tolist(), pca.explained_variance_ratio_.tolist())


def loss_rows(
    functions: Sequence[LossFunction], directions: tuple[Tensor, Tensor], offsets: Sequence[float], rows: Sequence[int]
) -> Iterator[tuple[int, list[float]]]:
    """Compute the loss on rows of a grid around the weights, one row on each device at a time.

    Args:
        functions: The same function on each of the devices.
        directions: Of the columns, and of the rows.
        offsets: Places along both directions, in units of the directions.
        rows: Indices of the offsets in the second direction.

    Yields:
        An index and the losses of its row.
    """
    free: SimpleQueue[LossFunction] = SimpleQueue()
    for function in functions:
        free.put(function)

    def row(index: int) -> tuple[int, list[float]]:
        function = free.get()
        try:
            along, across = (direction.to(function.weights) for direction in directions)
            start = function.weights + offsets[index] * across
            return index, [function(start + offset * along) for offset in offsets]
        finally:
            free.put(function)  # else a row that waits for it would keep an error back

    with ThreadPoolExecutor(len(functions)) as pool:
        yield from pool.map(row, rows)  # which gives up what has not begun if nobody asks for more


def losses_in_ball(function: LossFunction, radius: float, draws: int, seed: int = 0) -> list[float]:
    """Compute the loss at random points around the weights, at each of which every filter has moved equally far.

    Args:
        function: The loss.
        radius: How far, in units of the norm of the filter.
        draws: Number of points.
        seed: Seed of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    return [function(function.weights + radius * function.random_direction(generator)) for _ in range(draws)]


def largest_eigenvalue(
    function: LossFunction, units: Tensor | None = None, tolerance: float = 0.02, seed: int = 0
) -> float:
    """Compute the largest eigenvalue of the Hessian of the loss, by Lanczos' method.

    Products with the Hessian are differences of gradients in float64, so that no layer needs to be differentiable
    twice. The step is short, so that few ReLU turn on or off within it.

    Args:
        function: The loss.
        units: Unit in which each weight is measured; None for 1. With the norms of the filters the eigenvalue does
            not depend on their scale, which some norms make meaningless (Dinh et al., ICML 2017).
        tolerance: Relative accuracy.
        seed: Seed of the first vector.
    """
    function = function.to(function.weights.device, torch.float64)
    weights, size = function.weights, len(function.weights)
    scale = torch.ones_like(weights) if units is None else units.to(weights)
    step, gradient = STEP * float(weights.norm()), function.gradient(weights)

    def product(vector: np.ndarray) -> np.ndarray:
        direction = torch.from_numpy(vector).to(weights).view(-1) * scale
        length = float(direction.norm()) or 1.0
        difference = function.gradient(weights + direction * (step / length)) - gradient
        return (difference * scale * (length / step)).cpu().numpy()

    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(size)
    kept = min(size, 12)  # vectors of Lanczos' method: each takes as much memory as the weights
    return float(eigsh(operator, k=1, which="LA", tol=tolerance, v0=start, ncv=kept, return_eigenvectors=False)[0])
