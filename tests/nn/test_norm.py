import pytest
import torch
from nn import naive

from knlightning.nn import KernelNorm1d, KernelNorm2d, KernelNorm3d, kernel_norm

NORMS = {1: KernelNorm1d, 2: KernelNorm2d, 3: KernelNorm3d}


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_layers_follow_the_definition(spatial):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *range(5, 5 + spatial), dtype=torch.float64)
    norm = NORMS[spatial](2, 2, 1, dropout_p=0.4, eval_statistics="clean").eval()
    settings = (2,) * spatial, (2,) * spatial, (1,) * 2 * spatial
    torch.testing.assert_close(norm(x), naive.kernel_norm(x, *settings))
    assert not norm.state_dict()


def test_all_settings_are_handed_on():
    x = torch.randn(2, 4, 5, 6)
    norm = KernelNorm2d(
        (2, 3), (1, 2), "valid", 0.4, 0.1, "expected", dilation=(2, 1), padding_mode="circular"
    ).eval()  # fmt: skip
    expected = kernel_norm(x, (2, 3), (1, 2), 0, 0.4, False, "expected", 0.1, dilation=(2, 1))
    assert torch.equal(norm(x), expected)
    norm = KernelNorm2d(2, padding=1, dropout_p=0.4, padding_mode="reflect")
    torch.manual_seed(0)
    trained = norm(x)
    torch.manual_seed(0)
    assert torch.equal(trained, kernel_norm(x, 2, padding=1, dropout_p=0.4, padding_mode="reflect"))
