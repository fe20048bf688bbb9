import pytest
import torch

from knlightning.callbacks.label_maps import coloured, palette_of


class Data:
    palette = ((1, 2, 3), (4, 5, 6))


def test_colours():
    palette = palette_of(Data, 2)
    assert palette.dtype == torch.uint8
    label_map = torch.tensor([[0, 1], [2, 255], [-1, 0]])
    assert coloured(label_map, palette).tolist() == [
        [[1, 2, 3], [4, 5, 6]],
        [[0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [1, 2, 3]],
    ]
    assert coloured(label_map.clamp(0, 1).to(torch.uint8), palette)[1].tolist() == [[4, 5, 6], [4, 5, 6]]


@pytest.mark.parametrize("datamodule", [None, object(), Data])
def test_without_a_palette_for_as_many_classes_the_colours_are_matplotlibs(datamodule):
    palette = palette_of(datamodule, 23)
    assert palette.shape == (24, 3)
    assert len({tuple(colour) for colour in palette[:20].tolist()}) == 20
    assert palette[0].tolist() == [31, 119, 180]
    assert palette[-1].tolist() == [0, 0, 0]
