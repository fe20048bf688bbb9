import torch
from torchvision.models.convnext import CNBlock

from knlightning.privacy import PerSampleGradients
from knlightning.privacy.layer_scale import LayerScale


def test_gradients_are_those_of_single_samples():
    torch.manual_seed(0)
    block, received = CNBlock(4, 0.3, 0.0).double(), []
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    handles = LayerScale(block, lambda *given: received.append(given)).watch()
    block(x).square().sum().backward()
    ((layer, samples),) = received
    assert layer is block
    for handle in handles:
        handle.remove()
    for image, found in zip(x, samples, strict=True):
        (expected,) = torch.autograd.grad(block(image[None]).square().sum(), block.layer_scale)
        torch.testing.assert_close(found, expected)
    assert len(received) == 1  # nothing is watched any more


def test_stochastic_depth_is_that_of_the_forward_pass():
    torch.manual_seed(0)
    block = CNBlock(4, 0.3, 0.5).double()
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    torch.manual_seed(1)
    block(x).square().sum().backward()
    expected = {p: p.grad.clone() for p in block.parameters()}
    block.zero_grad()
    gradients = PerSampleGradients(block, "sum")
    gradients.attach()
    torch.manual_seed(1)
    block(x).square().sum().backward()
    norms = gradients.norms()
    assert 0 < (norms == 0).sum() < 6  # the samples whose block was skipped
    gradients.accumulate(torch.ones(6))
    for parameter, grad in expected.items():
        torch.testing.assert_close(parameter.summed_grad, grad)
