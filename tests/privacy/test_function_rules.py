import pytest
import torch
import torch.nn.functional as F
from privacy.micro_batches import check
from torch import nn

from knlightning.nn import (
    GroupKNConv1d,
    GroupKNConv2d,
    GroupKNConv3d,
    KNConvTranspose1d,
    KNConvTranspose2d,
    KNConvTranspose3d,
    StandardizedKNConv2d,
    kn_conv,
)

torch.manual_seed(0)


class OwnConv(nn.Conv2d):
    """A convolution with standardized weights, as in networks without normalization."""

    def forward(self, x):
        weight = F.layer_norm(self.weight, self.weight.shape[1:])
        return F.conv2d(x, weight * self.weight.mean().exp(), self.bias, self.stride, self.padding)


class OwnKNConv(nn.Module):
    """A kernel normalized convolution of parameters of its own."""

    def __init__(self, frozen=""):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(4, 3, 3, 3)), nn.Parameter(torch.empty(4))
        self.residual = nn.Parameter(torch.empty(4, 3, 4))
        for name in frozen.split():
            self.get_parameter(name).requires_grad_(False)

    def forward(self, x):
        residual = self.residual.expand(len(x), 4, 3, 4)
        return kn_conv(x, self.weight, self.bias, dropout_p=0.2, relu_input=True, residual=residual)


class OwnNorm(nn.GroupNorm):
    pass


class OwnLayerNorm(nn.LayerNorm):
    pass


class OwnLinear(nn.Linear):
    pass


class Attention(nn.Module):
    """Queries, keys and values are the same, or differ in lengths or channels too."""

    def __init__(self, kind, mask=None, need_weights=False, batch_first=True, **kwargs):
        super().__init__()
        widths = {"kdim": 3, "vdim": 5} if kind == "widths" else {}
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **widths, **kwargs)
        self.kind, self.mask, self.need_weights = kind, mask, need_weights
        self.key, self.value = nn.Linear(4, widths.get("kdim", 4)), nn.Linear(4, widths.get("vdim", 4))

    def forward(self, x):
        key, value = (x, x) if self.kind == "self" else (self.key(x[:, 1:]), self.value(x[:, 1:]))
        masks = {"attn_mask": self.mask, "need_weights": self.need_weights}
        if self.mask is not None and self.mask.dtype == torch.bool:
            masks["key_padding_mask"] = x.detach()[:, :, 0] > 1.2
        if not self.attention.batch_first:
            x, key, value = (each.transpose(0, 1) for each in (x, key, value))
        output, weights = self.attention(
            x, x if self.kind == "self" else key, x if self.kind == "self" else value, **masks
        )
        output = output if self.attention.batch_first else output.transpose(0, 1)
        return output if weights is None else torch.cat([output, weights], -1)


class Tokens(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.table, self.scale = nn.Embedding(7, 4, **kwargs), nn.Linear(4, 4)

    def forward(self, x):
        return self.scale(self.table((x * 2).round().long().clamp(0, 6)))


MASK = torch.tensor([[False, False, True], [False, True, False], [False, False, False]])
LAYERS = {
    "embedding": (Tokens(), (5,)),
    "embedding of two dimensions, with a row that is not trained": (Tokens(padding_idx=0), (2, 3)),
    "rms_norm": (nn.RMSNorm(5), (4, 3, 5)),
    "rms_norm of two dimensions": (nn.RMSNorm([3, 5], eps=0.1), (4, 3, 5)),
    "prelu": (nn.PReLU(), (4, 3)),
    "prelu with channels": (nn.PReLU(4), (4, 3, 5)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), (4, 5)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 3, (3, 2), (2, 3), (1, 0), (1, 2), bias=False), (4, 4, 3)),
    "conv_transpose2d, dilated": (nn.ConvTranspose2d(2, 3, 3, 1, 1, 1, dilation=2), (2, 4, 3)),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 2, 2, 2), (2, 2, 3, 2)),
    "KNConvTranspose1d": (KNConvTranspose1d(4, 6, 3, 2, 1, 1, 2, dropout_p=0.3), (4, 5)),
    "KNConvTranspose2d": (KNConvTranspose2d(4, 3, (3, 2), (2, 4), (1, 0), (1, 2), bias=False), (4, 4, 3)),
    "KNConvTranspose2d, stride above the kernel": (KNConvTranspose2d(2, 4, 1, 2, 0, 1, 2, dropout_p=0.2), (2, 3, 2)),
    "KNConvTranspose2d, dilated": (KNConvTranspose2d(2, 3, 3, 1, 1, dropout_p=0.2, dilation=2), (2, 4, 3)),
    "KNConvTranspose3d": (KNConvTranspose3d(2, 2, 2, 2, dropout_p=0.0), (2, 2, 3, 2)),
    "GroupKNConv1d": (GroupKNConv1d(4, 2, 3, 2, 1, groups=2, dropout_p=0.3), (4, 5)),
    "GroupKNConv2d": (GroupKNConv2d(3, 3, (3, 2), padding=1, groups=3, dropout_p=0.2, relu_output=True), (3, 4, 3)),
    "GroupKNConv2d, circular": (
        GroupKNConv2d(4, 4, 3, 2, 1, 2, bias=False, dropout_p=0.2, padding_mode="circular"),
        (4, 4, 3),
    ),
    "GroupKNConv3d": (GroupKNConv3d(4, 2, 2, groups=2, dropout_p=0.0, dilation=2), (4, 3, 3, 4)),
    "StandardizedKNConv2d": (StandardizedKNConv2d(3, 4, 3, 2, 1, dropout_p=0.2, relu_output=True), (3, 5, 6)),
    "own KNConv": (OwnKNConv(), (3, 5, 6)),
    "own KNConv, bias alone": (OwnKNConv("weight residual"), (3, 5, 6)),
    "self-attention": (Attention("self"), (3, 4)),
    "self-attention with weights and a mask": (Attention("self", MASK, True), (3, 4)),
    "self-attention with a sum": (Attention("self", torch.randn(3, 3).double(), bias=False), (3, 4)),
    "self-attention, samples second": (Attention("self", batch_first=False), (3, 4)),
    "cross-attention": (Attention("lengths"), (3, 4)),
    "cross-attention of other widths": (Attention("widths", need_weights=True), (3, 4)),
    "own convolution": (OwnConv(3, 4, 3, 2, 1), (3, 5, 6)),
    "own norm": (OwnNorm(2, 4), (4, 3, 5)),
    "own layer norm": (OwnLayerNorm(5), (4, 3, 5)),
    "own linear layer": (OwnLinear(4, 3), (2, 4)),
    "encoder": (nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), (3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_micro_batches(name):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, *shape, dtype=torch.float64)
    check(layer.double(), x)
    check(layer, x, views=2)
    check(layer, x[:1])
    check(layer, x[:0])
