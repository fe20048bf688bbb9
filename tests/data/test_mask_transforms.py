import torch
from torch import Tensor
from torchvision import tv_tensors

from knlightning.data.mask_transforms import PadRightBottom, RandomScale


def test_an_image_and_its_mask_are_scaled_alike():
    rows = torch.arange(10, dtype=torch.uint8).view(10, 1).expand(10, 20) * 20
    torch.manual_seed(0)
    sizes = set()
    for _ in range(60):
        image, mask = RandomScale(0.5, 1.5, 0.5)(tv_tensors.Image(rows[None].clone()), tv_tensors.Mask(rows.clone()))
        assert isinstance(image, tv_tensors.Image)
        assert isinstance(mask, tv_tensors.Mask)
        assert image.shape[1:] == mask.shape
        assert {*mask.unique().tolist()} <= {*rows.unique().tolist()}
        # half a pixel of the coarser grid is what interpolation and choice of the nearest pixel differ by
        assert (image[0].int() - mask.int()).abs().max() <= 20
        sizes.add(tuple(mask.shape))
    assert sizes == {(5, 10), (10, 20), (15, 30)}
    tiny, _ = RandomScale(0.1, 0.1, None)(tv_tensors.Image(rows[None, :2, :4]), tv_tensors.Mask(rows[:2, :4]))
    assert tiny.shape == (1, 1, 1)


def test_padding_is_black_to_the_right_and_below_and_does_not_count():
    image, mask = torch.full((3, 2, 3), 9, dtype=torch.uint8), torch.full((2, 3), 4, dtype=torch.uint8)
    for size in ((4, 5), (1, 5), (4, 1), (1, 1)):
        padded, labels = PadRightBottom(size)(tv_tensors.Image(image), tv_tensors.Mask(mask))
        height, width = max(2, size[0]), max(3, size[1])
        expected = torch.full((height, width), 255, dtype=torch.uint8)
        expected[:2, :3] = 4
        assert torch.equal(labels.as_subclass(Tensor), expected)
        assert torch.equal(padded.as_subclass(Tensor), (expected == 4).expand(3, -1, -1) * torch.tensor(9).byte())
