"""A file of published weights, in place of a checkpoint of a run."""

import csv
import os

import published
import pytest
import torch
from commands.runs import refused
from lightning.pytorch import LightningDataModule
from PIL import Image
from standins import write_config
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from knlightning.commands.main import main, run
from knlightning.data import FolderImages
from knlightning.models import KNResNet18_Weights, knresnet18
from knlightning.models.norm_torch import norm_torch_names

SIZE = 128  # the least that the network reduces to more than nothing is 97


class Images(LightningDataModule):
    """Random images with labels of 1000 classes, and a folder of images to predict on."""

    image_size = (SIZE, SIZE)

    def __init__(self, predict_dir: str = "images") -> None:
        super().__init__()
        self.predict_dir = predict_dir

    def val_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(3, 3, SIZE, SIZE, generator=generator)
        return DataLoader(TensorDataset(images, torch.randint(1000, (3,), generator=generator)), 2)

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(FolderImages(self.predict_dir, self.image_size))

    def on_after_batch_transfer(self, batch: tuple[Tensor, object], dataloader_idx: int) -> tuple[Tensor, object]:
        images, rest = batch
        return images / 255 if images.dtype == torch.uint8 else images, rest


@pytest.fixture(scope="module")
def network():
    """A network with the weights of the file."""
    model = knresnet18().eval()
    for name, tensor in model.state_dict().items():
        tensor.copy_(published.weights(name, tensor.shape))
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch, network):
    """A folder with a configuration, and the file in the published form."""
    monkeypatch.chdir(tmp_path)
    state = network.state_dict()
    weights = {theirs: state[ours] for theirs, ours in norm_torch_names(network).items()}
    (tmp_path / "checkpoints").mkdir()  # as in a run, of which this is none
    torch.save({"model": weights, "epoch": 99}, tmp_path / "checkpoints" / "published.pth")
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    model = {"backbone": {"class_path": "knlightning.models.knresnet18"}}
    write_config(
        tmp_path / "imagenet.yaml",
        {
            "model": {"class_path": "knlightning.tasks.ClassificationTask", "init_args": model},
            "data": {"class_path": f"{__name__}.Images"},
            "trainer": trainer,
        },
    )
    return tmp_path


ARGS = ["--config", "imagenet.yaml", "--ckpt_path", "checkpoints/published.pth"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation(folder, network, capsys, command):
    metrics = run([command, *ARGS]).trainer.callback_metrics
    images, labels = next(iter(DataLoader(Images().val_dataloader().dataset, 3)))
    with torch.no_grad():
        expected = F.cross_entropy(network(images), labels)
    assert metrics[f"{'val' if command == 'validate' else 'test'}/loss"].item() == pytest.approx(
        expected.item(), rel=1e-4
    )
    printed = capsys.readouterr().out
    assert "published.pth holds weights, without a run (36 tensors taken)" in printed
    assert "before any training" not in printed
    assert sorted(os.listdir()) == ["checkpoints", "imagenet.yaml"]


def test_predictions(folder, network):
    (folder / "images").mkdir()
    Image.new("RGB", (SIZE, SIZE), (200, 100, 50)).save(folder / "images" / "a.png")
    main(["predict", *ARGS])
    image = torch.tensor([200, 100, 50]).div(255).view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        probabilities = network(image).softmax(1)
    with (folder / "runs" / "imagenet" / "0" / "predictions.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["class"] == str(int(probabilities.argmax()))
    assert float(row["probability"]) == pytest.approx(float(probabilities.max()), abs=1e-5)


def test_export(folder, network):
    main(["export", *ARGS, "--to", "out"])
    exported = torch.load(folder / "out" / "weights.pt", weights_only=True)
    torch.testing.assert_close(exported, dict(network.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("command", "args", "said"),
    [
        ("fit", [], "published.pth holds weights alone, and no run that could go on: begin a new one"),
        (
            "test",
            ["--model.backbone", "knlightning.models.knresnet34"],
            "conv2.bias is (512,), needed (256,)\n  and 37 more",
        ),
        ("predict", ["--model.backbone", "standins.TinyNet"], "published weights are those of knresnet18, 34 and 50"),
        ("predict", ["--model.backbone.num_classes", "10"], "misshapen: fc.bias is (1000,), needed (10,)"),
    ],
)
def test_what_does_not_fit(folder, capsys, command, args, said):
    assert said in refused(capsys, command, *ARGS, *args)
    assert sorted(os.listdir()) == ["checkpoints", "imagenet.yaml"]


def test_other_files_stay_damaged_checkpoints(folder, capsys):
    torch.save({"model": {"a": 1}}, folder / "checkpoints" / "published.pth")
    assert "published.pth is damaged, or not a checkpoint of a run" in refused(capsys, "test", *ARGS)


def test_by_their_name(folder, network, capsys, monkeypatch):
    weights = KNResNet18_Weights.IMAGENET1K_NORM_TORCH
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
    os.rename(folder / "checkpoints" / "published.pth", weights.file)
    run(["validate", "--config", "imagenet.yaml", "--ckpt_path", "imagenet1k_norm_torch"])
    assert "imagenet1k_norm_torch holds weights, without a run (36 tensors taken)" in capsys.readouterr().out
