import torch
from hypothesis import given, settings
from nn.cases import cases, close

from knlightning.nn import kn_conv


@settings(max_examples=30, deadline=None)
@given(cases())
def test_compilers_and_transforms_get_the_gradient_of_the_closed_form(case):
    """`torch.func` takes the composite operations; their gradient is the closed form's."""
    x, weight, *rest = case.arguments()

    def loss(x, weight):
        return kn_conv(x, weight, *rest, mask=case.mask, **case.rest).square().sum()

    closed = torch.autograd.grad(loss(x, weight), (x, weight))
    composite = torch.func.grad(loss, argnums=(0, 1))(x.detach(), weight.detach())
    for a, b in zip(closed, composite, strict=True):
        close(a, b.detach())
