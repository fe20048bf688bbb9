import torch

from knlightning.data import scenes
from knlightning.data.digits import read_ink


def test_digits_are_lighter_than_the_background_and_labelled_by_their_ink(monkeypatch):
    monkeypatch.setattr(scenes, "SCENES_PER_BLOCK", 20)
    ink, labels = read_ink(True)
    centres, sizes = torch.tensor([[24.0, 40.0]]), torch.tensor([32.0])
    rendered = scenes._render(ink[:1].float() / 16, centres, sizes, torch.zeros(1), (48, 72))
    # unturned and four times as large, a digit lies where it was put, as torch scales it
    expected = torch.nn.functional.interpolate(ink[:1].float() / 16, scale_factor=4, mode="bilinear")
    torch.testing.assert_close(rendered[0, 0, 10:38, 26:54], expected[0, 0, 2:30, 2:30])
    assert rendered[..., :22].sum() == rendered[..., 58:].sum() == 0
    turned = scenes._render(ink[:1].float() / 16, centres, sizes, torch.full((1,), torch.pi / 2), (48, 72))
    # not mirrored
    torch.testing.assert_close(turned[0, 0, 8:40, 24:56], rendered[0, 0, 8:40, 24:56].rot90(-1), atol=1e-4, rtol=0)
    images, masks = scenes.compose_scenes(ink, labels, 20, (64, 64), 0)
    light = images.float().mean(1)
    assert light[(masks > 0) & (masks < 255)].mean() > light[masks == 0].mean() + 60


def test_every_digit_gets_its_own_class(monkeypatch):
    monkeypatch.setattr(scenes, "SCENES_PER_BLOCK", 3)
    ink, labels = read_ink(True)
    for digit in range(10):
        _, masks = scenes.compose_scenes(ink[labels == digit], labels[labels == digit], 3, (64, 64), 0)
        assert masks.unique().tolist() == [0, digit + 1, 255]
