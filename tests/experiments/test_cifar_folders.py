import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from experiments import cifar_folders


def test_folders_have_the_images_of_their_classes(tmp_path, monkeypatch, capsys):
    images, labels = torch.randint(0, 256, (60, 3, 4, 4), dtype=torch.uint8), torch.arange(60) % 10
    monkeypatch.setattr(cifar_folders.CIFAR10DataModule, "read", lambda self, train: (images, labels))
    cifar_folders.write("data", str(tmp_path), few=2, val=3)
    assert capsys.readouterr().out == "first train 30 val 15\nsecond train 10 val 15\n"
    names = {path.name for path in tmp_path.glob("*/train/*")}
    assert names == set(cifar_folders.CIFAR10DataModule.class_names)
    assert torch.equal(pil_to_tensor(Image.open(tmp_path / "first/train/bird/52.png")), images[52])
    assert sorted(path.name for path in (tmp_path / "second/train/deer").iterdir()) == ["14.png", "4.png"]
