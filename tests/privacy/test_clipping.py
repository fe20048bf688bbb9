import pytest
import torch
from torch import nn

from knlightning.privacy.clipping import ClippedSum, clipping_weights


def test_weights_are_clipped_to_the_bound():
    norms = torch.tensor([0.0, 0.5, 1.0, 3.0, float("inf"), float("nan")])
    weights = clipping_weights(norms, 1.0, "flat")
    assert weights[:2].tolist() == [1.0, 1.0]
    assert weights[3] == pytest.approx(1 / 3, rel=1e-3)
    assert weights[4:].tolist() == [0.0, 0.0]
    assert ((weights * norms)[:4] <= 1.0).all()
    automatic = clipping_weights(norms, 2.0, "automatic")
    assert ((automatic * norms)[:4] <= 2.0).all()
    assert (automatic * norms)[3] == pytest.approx(2.0, rel=5e-3)


def test_sums_of_micro_batches_become_gradients():
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2), torch.randn(5, 3) * torch.tensor([0.1, 1.0, 2.0, 0.2, 1.0])[:, None]
    samples = []
    for row in x:
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(net(row).sum(), list(net.parameters()))])
        samples.append(gradient * min(1.0, 2.0 / gradient.norm()))
    expected = torch.stack(samples).sum(0)
    assert {bool(sample.norm() < 1.999) for sample in samples} == {True, False}
    sums = ClippedSum(net, 2.0, "flat")
    for part in (x[:2], x[2:]):
        (net(part).sum() / 2).backward()  # halved, as where the gradients of two batches are accumulated
        sums.add(2.0)
    total = sums.pop()
    torch.testing.assert_close(total, expected.double(), rtol=1e-3, atol=0)
    assert not sums.pop().any()
    sums.set_gradients(total)
    assert torch.equal(torch.cat([p.grad.flatten() for p in net.parameters()]), total.float())
    sums.close()
    assert not any(hasattr(p, "summed_grad") for p in net.parameters())


def test_large_sums_are_not_rounded_by_more_than_the_margin():
    """The gradients of all samples point in one direction; float32 would be off by a hundredth of a sample."""
    net, x = nn.Linear(1, 1, bias=False), torch.full((64, 1), 0.3)
    sums = ClippedSum(net, 0.1, "flat")

    def total(micro_batches):
        for _ in range(micro_batches):
            net(x).sum().backward()
            sums.add(1.0)
        return float(sums.pop())

    assert abs(total(200) - 200 * total(1)) < 1e-5 * 0.1
