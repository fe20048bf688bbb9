import pytest
import torch
import torch.nn.functional as F
from torch import nn

from knlightning.nn.windows import Window, check_input, per_dimension

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def test_settings_are_expanded_to_all_dimensions():
    assert Window.of(2, 3) == Window((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1))
    assert Window.of(1, [4], 2, [3], 5) == Window((4,), (2,), ((3, 3),), (5,))
    assert Window.of(2, (2, 3), (1, 2), (4, 5)).padding == ((4, 4), (5, 5))
    window = Window.of(2, 2, padding=(1, 2, 3, 4), dilation=3)  # left, right, top, bottom
    assert (window.padding, window.pads, window.span) == (((3, 4), (1, 2)), (1, 2, 3, 4), (4, 4))
    assert Window.of(3, 3, padding="valid") == Window.of(3, 3)
    assert Window.of(2, (4, 3), padding="same", dilation=(1, 2)).padding == ((1, 2), (2, 2))


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("settings", [(3, 2, 2, 1), (2, 1, "same", 3), (3, 2, "valid", 2), (2, 3, 1, 2)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_windows_are_those_of_torch(spatial, padding_mode, settings):
    torch.manual_seed(0)
    conv = CONVOLUTIONS[spatial](2, 3, *settings, padding_mode=padding_mode, bias=False, dtype=torch.float64)
    x = torch.randn(2, 2, *range(6, 6 + spatial), dtype=torch.float64)
    padded, window = Window.of(spatial, *settings).pad(x, padding_mode)
    units = window.unfold(padded)
    assert units.shape[2 : 2 + spatial] == window.positions(padded.shape[2:])
    letters = "xyz"[:spatial]
    torch.testing.assert_close(torch.einsum(f"nc...{letters},oc{letters}->no...", units, conv.weight), conv(x))


def test_elements_of_windows():
    window = Window.of(1, 3, 2, (1,), 2)
    padded = torch.arange(9)
    assert [padded[at].tolist() for at in window.elements(0, 9)] == [[0, 2, 4], [2, 4, 6], [4, 6, 8]]


def test_zeros_are_left_to_others_and_what_is_not_padded_is_not_copied():
    x, window = torch.ones(1, 1, 3, 3), Window.of(2, 3, padding=1)
    assert window.pad(x, "zeros") == (x, window)
    assert Window.of(2, 3).pad(x, "reflect")[0] is x
    padded, rest = window.pad(x, "circular")
    assert padded.shape == (1, 1, 5, 5)
    assert rest == Window.of(2, 3)
    assert torch.equal(window.unfold(x), rest.unfold(F.pad(x, (1, 1, 1, 1))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 0}, "^kernel_size must be a whole number at least 1, or 2 of them .*, got 0$"),
        ({"stride": (1, 2, 3)}, r"^stride must be .*, got \(1, 2, 3\)$"),
        ({"stride": 1.5}, r"^stride must be .*, got 1\.5$"),
        ({"dilation": (1, 0)}, r"^dilation must be .*, got \(1, 0\)$"),
        ({"padding": -1}, r'^padding must be .*, \(left, right, top, bottom\), "same" or "valid", got -1$'),
        ({"padding": "full"}, "^padding must be .*, got 'full'$"),
        ({"padding": "same", "stride": (1, 2)}, r'^stride must be 1 .* with padding="same", got \(1, 2\)$'),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Window.of(2, **{"kernel_size": 3} | settings)


def test_one_dimension_is_not_offered_several_numbers():
    with pytest.raises(ValueError, match=r'^padding must be a whole number at least 0, "same" or "valid", got -1$'):
        Window.of(1, 3, padding=-1)
    with pytest.raises(ValueError, match=r"^sides must be a whole number at least 2, got \(1,\)$"):
        per_dimension((1,), 1, "sides", 2)


@pytest.mark.parametrize(
    ("padding", "padding_mode", "message"),
    [
        (0, "zeros", r"^kernel_size must be small enough .*dimension 0 the window spans 9 .* 0 \+ 5 \+ 0 = 5$"),
        ((2, 2), "mirror", "^padding_mode must be one of zeros, reflect, replicate, circular, got 'mirror'$"),
        ((5, 0), "reflect", '^padding must be at most 4 with padding_mode="reflect" on an input of size 5, got 5$'),
        ((6, 0), "circular", '^padding must be at most 5 with padding_mode="circular" on an input of size 5, got 6$'),
    ],
)
def test_inputs_that_do_not_fit_are_told(padding, padding_mode, message):
    with pytest.raises(ValueError, match=message):
        Window.of(2, 3, padding=padding, dilation=(4, 1)).pad(torch.ones(1, 2, 5, 6), padding_mode)


def test_inputs_have_one_to_three_spatial_dimensions_of_floats():
    check_input((1, 2, 3), torch.float16, 1)
    with pytest.raises(ValueError, match=r"^input must be .*got \(4, 5, 5\). The windows have 2$"):
        check_input((4, 5, 5), torch.float32, 2)
    with pytest.raises(ValueError, match="input must be"):
        check_input((4, 5), torch.float32, 0)
    with pytest.raises(TypeError, match=r"input must be a floating point tensor, got torch\.int64"):
        check_input((1, 2, 3), torch.int64, 1)
