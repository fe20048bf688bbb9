from pathlib import Path

import pytest
import timm
import torch

import knlightning.timm
from knlightning.models import knresnet8

assert knlightning.timm


def test_networks_by_their_names():
    assert {"knresnet50", "preact_resnet18", "resnet8"} <= set(timm.list_models())
    assert timm.create_model("resnet18").__module__.startswith("timm.")  # timm keeps its own
    network = timm.create_model("knresnet8", num_classes=3, low_resolution=False)
    assert network.fc.out_features == 3
    assert timm.create_model("knresnet8", num_classes=0)(torch.rand(1, 3, 8, 8)).shape == (1, 64)
    settings = timm.data.resolve_data_config(model=network)
    assert settings["input_size"] == (3, 224, 224)
    assert (settings["crop_pct"], settings["mean"][0]) == (0.875, 0.485)


def test_pretrained_networks(monkeypatch):
    asked = []
    monkeypatch.setattr("knlightning.models.knresnet.load_weights", lambda network, name: asked.append(name))
    timm.create_model("knresnet18", pretrained=True, num_classes=2)
    assert asked == ["imagenet1k_norm_torch"]
    with pytest.raises(ValueError, match="there are no published weights of knresnet8"):
        timm.create_model("knresnet8", pretrained=True)


def test_networks_that_are_stored(tmp_path, monkeypatch):
    network = knresnet8(num_classes=3, activation="gelu")
    network.save_pretrained(tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, dropout_p=0.2)
    assert str(again) == str(knresnet8(num_classes=3, activation="gelu", dropout_p=0.2))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    assert not torch.equal(timm.create_model(f"local-dir:{tmp_path}").fc.weight, network.fc.weight)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    other = timm.create_model("hf-hub:me/net@main", pretrained=True, num_classes=5)
    assert other.fc.out_features == 5
    assert torch.equal(other.stem[0].weight, network.stem[0].weight)


def test_torch_hub():
    clone = str(Path(__file__).parents[1])
    network = torch.hub.load(clone, "knresnet8", source="local", num_classes=3)
    assert network.state_dict().keys() == knresnet8().state_dict().keys()
