import pytest

from knlightning.nn import KernelNorm1d, KernelNorm2d, KNConv2d


def test_repr_shows_what_is_not_default():
    assert repr(KNConv2d(3, 8, 3)) == "KNConv2d(3, 8, kernel_size=(3, 3), dropout_p=0.05)"
    assert repr(KNConv2d(4, 8, 2, 2, (1, 0, 1, 0), 2, False, 0.1, 1e-3, "clean", dilation=2)) == (
        "KNConv2d(4, 8, kernel_size=(2, 2), stride=(2, 2), padding=(1, 0, 1, 0), dilation=(2, 2), eps=0.001, "
        "eval_statistics='clean', dropout_p=0.1, groups=2, bias=False)"
    )
    assert repr(KernelNorm1d(1)) == "KernelNorm1d(kernel_size=(1,), dropout_p=0.25)"
    assert "padding='same', padding_mode='circular'" in repr(KernelNorm1d(3, padding="same", padding_mode="circular"))


@pytest.mark.parametrize("make", [lambda **k: KNConv2d(4, 8, 3, **k), lambda **k: KernelNorm2d(3, **k)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout_p": 1.0}, "dropout_p must be a number at least 0 and below 1, got 1.0"),
        ({"eval_statistics": "x"}, "eval_statistics must be one of clean, expected, sampled, got 'x'"),
        ({"stride": (1, 2, 3)}, "stride must be"),
        ({"dilation": 0}, "dilation must be"),
        ({"padding": (1, 2, 3)}, r"padding must be .*\(left, right, top, bottom\).*, got \(1, 2, 3\)"),
        ({"padding_mode": "edge"}, "padding_mode must be one of zeros, reflect, replicate, circular, got 'edge'"),
    ],
)
def test_wrong_arguments_are_named_when_the_layer_is_made(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)
