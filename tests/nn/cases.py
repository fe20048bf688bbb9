"""Random settings and inputs of kernel normalization, and comparisons in float64."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from knlightning.nn.dropout import draw_dropped, mask_of


@dataclass
class Case:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple
    padding: tuple | str
    pads: tuple
    groups: int
    p: float
    mask: Tensor | None = None
    given: Tensor | None = None
    rest: dict = field(default_factory=dict)

    def arguments(self):
        """The positional arguments of kn_conv, as far as dropout_p."""
        return self.x, self.weight, self.bias, self.stride, self.padding, self.groups, self.p

    def tensors(self):
        """What gets a gradient."""
        return [t for t in (self.x, self.weight, self.bias) if t is not None]


@st.composite
def cases(draw):
    """Draw a case; `mask` is what the seed 5 draws, or `given` where this is not None."""
    spatial = draw(st.integers(1, 3))
    largest = 3 if spatial < 3 else 2
    kernel = draw(st.tuples(*[st.integers(1, largest)] * spatial))
    stride = draw(st.tuples(*[st.integers(1, largest)] * spatial))
    dilation = draw(st.tuples(*[st.integers(1, largest)] * spatial)) if draw(st.booleans()) else (1,) * spatial
    form = draw(st.sampled_from(["numbers", "sides", "same", "valid"]))
    if form == "sides" and spatial == 2:
        padding = pads = draw(st.tuples(*[st.integers(0, 2)] * 4))
    elif form == "same":
        padding, stride = "same", (1,) * spatial
        around = [d * (k - 1) for d, k in zip(reversed(dilation), reversed(kernel), strict=True)]
        pads = tuple(p for total in around for p in (total // 2, total - total // 2))
    else:
        padding = draw(st.tuples(*[st.integers(0, largest - 1)] * spatial))
        pads = tuple(p for size in reversed(padding) for p in (size, size))
        if form == "valid":
            padding, pads = "valid", (0,) * 2 * spatial
    size = [d * (k - 1) + 1 + draw(st.integers(0, largest)) for k, d in zip(kernel, dilation, strict=True)]
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    if mode in ("reflect", "circular") and max(pads) >= min(size):
        mode = "replicate"
    groups = draw(st.integers(1, 2))
    channels, filters = (groups * draw(st.integers(1, 2)) for _ in range(2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = randn(draw(st.integers(0, 3)), channels, *size) * draw(st.sampled_from([0.1, 1.0, 30.0]))
    x += draw(st.sampled_from([0.0, 5.0]))
    if spatial == 2 and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    padded = x if mode == "zeros" or not any(pads) else torch.nn.functional.pad(x, pads, mode)
    case = Case(
        x=x,
        weight=randn(filters, channels // groups, *kernel),
        bias=randn(filters) if draw(st.booleans()) else None,
        stride=stride,
        padding=padding,
        pads=pads,
        groups=groups,
        p=draw(st.sampled_from([0.0, 0.05, 0.5])),
        # a unit of equal elements has no variance: 1 / sqrt(eps) magnifies the rounding of the reference itself
        rest={"dilation": dilation, "padding_mode": mode, "eps": 1e-2},
    )
    if case.p and draw(st.booleans()):
        case.mask = case.given = torch.rand(padded.shape, generator=generator) >= case.p
    elif case.p and x.numel():
        torch.manual_seed(5)
        case.mask = mask_of(draw_dropped(padded.numel(), case.p), padded)
    for tensor in case.tensors():
        tensor.requires_grad_()
    torch.manual_seed(5)
    return case


def close(ours, reference):
    scale = reference.abs().max().clamp(min=1.0) if reference.numel() else 1.0
    torch.testing.assert_close(ours / scale, reference / scale, rtol=0, atol=1e-10)


def gradients(output, inputs):
    direction = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape)
    return torch.autograd.grad((output * direction).sum(), inputs)


def close_with_gradients(ours, reference, inputs):
    close(ours, reference)
    for a, b in zip(gradients(ours, inputs), gradients(reference, inputs), strict=True):
        close(a, b)


def compare(ours, inputs, reference, exact, tolerance):
    """Compare outputs, and gradients of the same direction, relative to their largest element."""
    direction = torch.cos(torch.arange(ours.numel())).reshape(ours.shape).to(ours.dtype)
    found = torch.autograd.grad(ours, inputs, direction)
    expected = torch.autograd.grad(reference, exact, direction.double())
    for a, b in zip((ours, *found), (reference, *expected), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0) if b.numel() else a.shape == b.shape
    for a, b in zip(found, inputs, strict=True):
        assert a.dtype == b.dtype
