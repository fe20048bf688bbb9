import torch
from torch import nn

from experiments.traffic import count_bytes, layers
from knlightning.nn import KNConv2d, fused_kernels


def bytes_of(layer, fused=True, **around):
    x = torch.empty(8, 256, 56, 56, device="meta").requires_grad_()
    with fused_kernels(fused):
        return count_bytes(lambda: layer(x, **around)) / x.nbytes


def test_a_fused_layer_moves_no_more_than_batch_norm_and_relu():
    """In tensors of the size of the input; small ones such as partial sums are counted too."""
    named = layers()
    kernel, batch, plain = (named[name] for name in ("KNConv, fused", "BatchNorm and ReLU", "KNConv, plain"))
    fused = bytes_of(kernel, relu_output=True)
    assert 9 < fused < bytes_of(batch) < 11  # read; read and write; three in each of the two passes backward
    assert bytes_of(plain, fused=False, relu_output=True) > 2 * fused


def test_operations_are_counted_by_their_tensors():
    x = torch.empty(100, 10, device="meta", requires_grad=True)
    assert count_bytes(lambda: nn.functional.relu(x)) == (2 + 3) * x.nbytes


def test_nothing_large_is_kept_but_input_and_output():
    layer = KNConv2d(64, 64, 3, padding=1).to("meta")
    x = torch.empty(8, 64, 32, 32, device="meta", requires_grad=True)
    kept = []
    with fused_kernels(True), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        count_bytes(lambda: layer(x, relu_output=True))
    assert 2 * x.nbytes < sum(t.nbytes for t in kept) < 2.1 * x.nbytes + layer.weight.nbytes
