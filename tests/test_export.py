import json
import shutil
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from safetensors import safe_open
from standins import TinyNet
from torch import nn

from knlightning import export as exporting
from knlightning.data import DigitsDataModule
from knlightning.export import FORMATS, check_request, export, preprocessing_of
from knlightning.models import fine_tuned, kernel_normalize, knresnet8
from knlightning.tasks import ClassificationTask

FILES = {"weights.pt", "weights.safetensors", "model.pt2", "model.onnx", "preprocessing.json"}


def test_scaling_is_described_as_the_datamodule_does_it():
    data = DigitsDataModule(scaling="standard")
    described = preprocessing_of(data)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    scaled = (images / 255 - torch.tensor(described["mean"])[:, None, None]) / torch.tensor(described["std"])[
        :, None, None
    ]
    torch.testing.assert_close(scaled, data.on_after_batch_transfer((images, None), 0)[0])
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, 3, 1, 1)
    lowest, highest = data.on_after_batch_transfer((ends, None), 0)[0].aminmax()
    assert described["range"] == pytest.approx([lowest.item(), highest.item()])


def test_files_hold_the_preprocessing(tmp_path):
    preprocessing = preprocessing_of(LightningDataModule(), image_size=(32, 32))  # which says nothing of itself
    assert (preprocessing["image_size"], preprocessing["resize"]) == ([32, 32], None)
    export(TinyNet(), tmp_path, ["safetensors", "torch_export"], (32, 32), {"classes": ["a"] * 10, "scaling": "unit"})
    expected = {"classes": json.dumps(["a"] * 10), "scaling": "unit"}
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert file.metadata() == expected
    found = dict.fromkeys(expected, "")
    torch.export.load(tmp_path / "model.pt2", extra_files=found)
    assert found == expected


@pytest.mark.slow
def test_kernel_normalized_network(tmp_path):
    model = knresnet8(num_classes=10).to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    differences = export(model, tmp_path / "out", list(FORMATS), (32, 32), {})
    assert set(differences) == FILES - {"preprocessing.json"}
    assert max(differences.values()) < 1e-5
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.training


def test_converted_and_fine_tuned_network(tmp_path):
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9)
    model = ClassificationTask(fine_tuned(kernel_normalize(nn.Sequential(*layers))[0], 2), freeze="0").backbone
    differences = export(model, tmp_path / "out", ["safetensors", "torch_export"], (8, 8), {})
    assert max(differences.values()) < 1e-5


# what is refused, and leaves nothing


class Undecided(TinyNet):
    """Cannot be traced: what it does depends on the values of the images."""

    def forward(self, images):
        return super().forward(images) if images.mean() > 0.1 else super().forward(-images)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Undecided(), "cannot be written in the format torch_export"),
        (knresnet8(num_classes=10, eval_statistics="sampled"), "other outputs when it is applied again"),
        (TinyNet(num_classes=9), "9 outputs and the data 10 classes"),
    ],
)
def test_networks_that_cannot_be_exported(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", ["state_dict", "torch_export"], (32, 32), {"classes": list("0123456789")})
    assert not (tmp_path / "out").exists()


def test_file_that_does_not_do_what_the_network_does(tmp_path, monkeypatch):
    changed = replace(FORMATS["torch_export"], read=lambda model, path: lambda images: model(images) + 0.01)
    monkeypatch.setitem(FORMATS, "torch_export", changed)
    with pytest.raises(ValueError, match=r"model.pt2 differs from the network by up to 0.01, .* nothing"):
        export(TinyNet(), tmp_path / "out", ["state_dict", "torch_export"], (32, 32), {})
    assert not (tmp_path / "out").exists()


def test_disk_that_is_full(tmp_path, monkeypatch):
    copied = []

    def copyfile(source, target):
        target.write_bytes(b"a part")
        copied.append(source.name)
        if len(copied) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(OSError, match="No space left"):
        export(TinyNet(), tmp_path / "out", ["state_dict"], (32, 32), {})
    assert copied == ["weights.pt", "preprocessing.json"]
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_in_the_file_show(tmp_path, monkeypatch):
    def write(model, images, path, texts):
        torch.save({name: tensor for name, tensor in model.state_dict().items() if "head" in name}, path)

    class Lenient(nn.Sequential):
        def load_state_dict(self, state, strict=True, assign=False):
            return super().load_state_dict(state, strict=False)

    monkeypatch.setitem(FORMATS, "state_dict", replace(FORMATS["state_dict"], write=write))
    with pytest.raises(ValueError, match=r"weights.pt differs"):
        export(Lenient(nn.Flatten(), nn.Linear(12, 2)), tmp_path / "out", ["state_dict"], (2, 2), {})


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"format onnx needs onnx, onnxruntime, onnxscript: pip install 'knlightning"):
        check_request(tmp_path / "out", ["state_dict", "onnx"])
