import copy
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from knlightning.analysis.landscape import (
    LossFunction,
    largest_eigenvalue,
    loss_rows,
    losses_in_ball,
    trajectory_plane,
    use_batch_statistics,
)
from knlightning.analysis.variants import compute_as_published
from knlightning.nn import KNConv2d

A = torch.diag(torch.tensor([3.0, 1.0, 0.5, -7.0, 2.0, 0.1])) + 0.1


class Weights(nn.Module):
    """Outputs its weights: the loss can then be any function of them."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        self.bias = nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, images):
        return torch.cat([self.matrix.flatten(), self.bias]).expand(len(images), -1)


def half_quadratic(weights, labels):
    return ((weights @ A.to(weights)) * weights).sum(1).mean() / 2


@pytest.fixture
def quadratic():
    return LossFunction(Weights(), torch.zeros(5, 1), torch.zeros(5), half_quadratic, batch_size=2)


def test_a_quadratic_and_its_gradient(quadratic):
    w = torch.tensor([3, 4, 1, 0, 0.5, 2])
    assert torch.equal(quadratic.weights, w)
    assert quadratic(2 * w) == pytest.approx(float(2 * w @ A @ w))
    assert torch.allclose(quadratic.gradient(2 * w), 2 * A @ w)
    assert torch.equal(quadratic.to("cpu", torch.float64).weights, w.double())  # wherever it was moved


def test_a_filter_moves_by_its_norm_and_biases_stay(quadratic):
    assert quadratic.filter_norms(quadratic.weights).tolist() == [5, 5, 1, 1, 0, 0]
    direction = quadratic.random_direction(torch.Generator().manual_seed(0))
    assert quadratic.filter_norms(direction).tolist() == pytest.approx([5, 5, 1, 1, 0, 0])
    assert not direction[4:].any()
    again = losses_in_ball(quadratic, 0.5, draws=3, seed=0)
    assert again[0] == quadratic(quadratic.weights + 0.5 * direction)
    assert len(set(again)) == 3


def test_eigenvalues_of_a_quadratic(quadratic):
    """The largest one, not the one that is largest in its absolute value, which is below zero."""
    assert largest_eigenvalue(quadratic) == pytest.approx(torch.linalg.eigvalsh(A)[-1].item(), rel=1e-3)
    units = torch.tensor([5.0, 5, 1, 1, 0, 0])
    scaled = torch.linalg.eigvalsh(units[:, None] * A * units)[-1].item()
    assert largest_eigenvalue(quadratic, quadratic.filter_norms(quadratic.weights)) == pytest.approx(scaled, rel=1e-3)


def test_rows_of_a_surface_on_several_devices(quadratic):
    x, y = torch.eye(6)[0], torch.eye(6)[4]
    offsets = [-1.0, 0.0, 1.0]
    rows = dict(loss_rows([quadratic, quadratic.to("cpu")], (x, y), offsets, [2, 0]))
    w = quadratic.weights
    for index, losses in rows.items():
        points = [w + offsets[index] * y + offset * x for offset in offsets]
        assert losses == pytest.approx([float(point @ A @ point) / 2 for point in points])
    assert list(rows) == [2, 0]


def test_an_error_in_a_row_is_raised(quadratic):
    losses = iter(torch.zeros(6))  # those of a row, of three batches at each place
    quadratic.loss = lambda *_: next(losses)
    rows = loss_rows([quadratic], (torch.eye(6)[0], torch.eye(6)[4]), [0.0, 1.0], [0, 1, 0])
    assert next(rows) == (0, [0, 0])
    time.sleep(0.1)  # until the third row is begun, too
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(rows)


def test_plane_of_a_trajectory():
    plane = torch.linalg.qr(torch.arange(12.0).view(6, 2).sin())[0].T
    weights = 1 + torch.tensor([[0.0, 4.0], [1.5, 2.0], [0.5, 1.0], [0.0, 0.0]]) @ plane
    directions, trajectory = trajectory_plane(list(weights))
    places = torch.tensor(trajectory.places)
    assert torch.allclose(places @ torch.stack(directions), weights - weights[-1], atol=1e-6)
    assert torch.allclose(torch.stack(directions) @ torch.stack(directions).T, 16 * torch.eye(2), atol=1e-4)
    assert places[0].norm() == pytest.approx(1)
    spreads = (places - places.mean(0)).square().sum(0)
    assert trajectory.explained == pytest.approx((spreads / spreads.sum()).tolist())
    assert trajectory.explained[0] > trajectory.explained[1]


def test_exact_hessian_of_a_network_with_kernel_normalization():
    """Its backward pass is written by hand, and cannot be differentiated again; that of Algorithm 1 can."""
    torch.manual_seed(0)
    network = nn.Sequential(KNConv2d(2, 3, 3), nn.Tanh(), KNConv2d(3, 2, 2), nn.Flatten(), nn.Linear(18, 3)).double()
    network[0].eval_statistics = network[2].eval_statistics = "clean"
    images, labels = torch.rand(4, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 2])
    function = LossFunction(network, images, labels, batch_size=3)
    published = copy.deepcopy(network).eval()
    compute_as_published(published)
    for layer in published.modules():
        layer.dropout_p = 0.0
    shapes = [parameter.shape for parameter in published.parameters()]

    def loss(weights):
        parts = weights.split([shape.numel() for shape in shapes])
        named = zip(dict(published.named_parameters()), parts, shapes, strict=True)
        state = {name: part.view(shape) for name, part, shape in named}
        return F.cross_entropy(torch.func.functional_call(published, state, images), labels)

    weights = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    hessian = torch.autograd.functional.hessian(loss, weights)
    exact = torch.linalg.eigvalsh(hessian)[-1].item()
    assert largest_eigenvalue(function, tolerance=1e-6) == pytest.approx(exact, rel=1e-3)


def test_batch_normalization_keeps_its_running_statistics():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten())
    with torch.no_grad():
        network[1](torch.randn(8, 2, 3, 3) * 3 + 1)
    network.train()
    function = LossFunction(network, torch.randn(4, 1, 2, 2), torch.zeros(4, dtype=torch.long))
    before = function(function.weights)
    function.gradient(function.weights + 1)
    assert function(function.weights) == before
    assert network.training
    units = function.filter_norms(function.weights)
    assert units[:2].all()
    assert not units[2:].any()  # biases, and scale and shift of the norm


def test_with_the_statistics_of_the_batch_a_filter_may_grow():
    """Batch normalization takes the scale of its input away, if its statistics follow."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=1e-12), nn.Flatten(), nn.Linear(8, 2))
    images, labels = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    function = LossFunction(network, images, labels)
    larger = function.weights.clone()
    larger[:2] *= 2
    assert function(larger) != pytest.approx(function(function.weights), rel=1e-3)
    use_batch_statistics(network)
    function = LossFunction(network, images, labels)
    assert function(larger) == pytest.approx(function(function.weights), rel=1e-5)
