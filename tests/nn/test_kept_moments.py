import pytest
import torch

from knlightning.nn import kn_conv
from knlightning.nn.kept_moments import normalization_of
from knlightning.nn.windows import Window


def test_normalization_of_an_output():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    mask = torch.rand(x.shape) > 0.2
    output = kn_conv(
        x.requires_grad_(), weight, None, 2, (1, 0, 2, 0), 1, 0.2, eps=0.1, mask=mask, relu_input=True, relu_output=True
    )
    found = normalization_of(output)
    units = torch.nn.functional.pad(x.relu() * mask / 0.8, (1, 0, 2, 0)).unfold(2, 2, 2).unfold(3, 2, 2)
    var, mean = torch.var_mean(units, (1, 4, 5), correction=0)
    torch.testing.assert_close(found.mean, mean.unsqueeze(1))
    torch.testing.assert_close(found.rstd, (var + 0.1).rsqrt().unsqueeze(1))
    assert found.input.data_ptr() == x.data_ptr()
    assert found[3:] == (Window.of(2, 2, 2, (1, 0, 2, 0)), True, True)


def test_only_outputs_with_a_gradient_have_a_normalization():
    x, weight = torch.rand(1, 2, 3, 3), torch.rand(2, 2, 2, 2, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"^output must be .* whose gradient is wanted, got a tensor made by MulBackward0$"
    ):
        normalization_of(kn_conv(x, weight) * 2)
    with torch.no_grad(), pytest.raises(ValueError, match="got a tensor made by no operation"):
        normalization_of(kn_conv(x, weight))


def test_other_padding_than_zeros_is_part_of_the_normalized_input():
    x, weight = torch.rand(1, 2, 3, 3), torch.rand(2, 2, 2, 2, requires_grad=True)
    found = normalization_of(kn_conv(x, weight, padding=1, padding_mode="circular", dilation=2))
    assert torch.equal(found.input, torch.nn.functional.pad(x, (1, 1, 1, 1), "circular"))
    assert found.window == Window.of(2, 2, dilation=2)
