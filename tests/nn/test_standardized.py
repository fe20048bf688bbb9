import torch

from knlightning.nn import KNConv2d, StandardizedKNConv2d, kn_conv


def test_the_filters_have_mean_0_and_variance_1():
    layer = StandardizedKNConv2d(4, 6, 3, 2, 1, 2, dropout_p=0.3, eval_statistics="expected").double().eval()
    layer.load_state_dict(KNConv2d(4, 6, 3, groups=2).state_dict())
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    var, mean = torch.var_mean(layer.weight, (1, 2, 3), correction=0, keepdim=True)
    filters = (layer.weight - mean) / (var + 1e-6).sqrt()
    expected = kn_conv(x, filters, layer.bias, 2, 1, 2, 0.3, False, "expected")
    torch.testing.assert_close(layer(x), expected)
    gradients = (torch.autograd.grad(output.sin().sum(), layer.weight) for output in (layer(x), expected))
    torch.testing.assert_close(*gradients)
