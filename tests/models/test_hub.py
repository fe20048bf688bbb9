import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import nn

from knlightning import models
from knlightning.models import HubModel, fcn_knresnet8, fine_tuned, kernel_normalize, knresnet8, list_models, resnet8
from knlightning.models.hub import CONFIG, WEIGHTS

MODELS = {model.name: model for model in list_models()}


def same(network, again):
    """Whether two networks are the same, the second in evaluation mode."""
    assert again is not network
    assert str(again) == str(network)
    assert not any(layer.training for layer in again.modules())
    state, restored = network.state_dict(), again.state_dict()
    assert list(state) == list(restored)
    assert all(torch.equal(state[name], restored[name]) and state[name].dtype == restored[name].dtype for name in state)
    assert all(parameter.requires_grad for parameter in again.parameters())
    images = torch.rand(2, 3, 24, 24, dtype=next(network.parameters()).dtype)
    with torch.no_grad():
        return torch.equal(network.eval()(images), again(images))


def test_every_network_has_the_methods():
    assert all(issubclass(inspect.signature(model.make).return_annotation, HubModel) for model in MODELS.values())
    with torch.device("meta"):
        assert "weights" not in models.knresnet18().made_by["model_args"]  # which are published ones


@pytest.mark.parametrize("name", ["knresnet8", "resnet8", "fcn_knresnet8", "fcn_resnet8"])
def test_networks_come_back(name, tmp_path):
    network = MODELS[name].make(num_classes=3)
    for buffer in network.buffers():
        buffer.fill_(2)
    network.save_pretrained(tmp_path)
    assert same(network, HubModel.from_pretrained(tmp_path))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["architecture"] == name
    assert config["model_args"] == MODELS[name].defaults | {"num_classes": 3}
    assert 'HubModel.from_pretrained("FOLDER")' in (tmp_path / "README.md").read_text()


def from_folder(network, folder):
    network.save_pretrained(folder)
    return type(network).from_pretrained(str(folder))


def test_arguments_and_a_new_last_layer(tmp_path):
    network = resnet8(num_classes=np.int64(5), norm="local_context", activation="mish", eps=0.1).double()
    assert same(network, from_folder(network, tmp_path))
    network.reset_classifier(4)
    again = from_folder(network, tmp_path)  # over what is there
    assert same(network, again)
    assert same(again, from_folder(again, tmp_path / "again"))
    network = fine_tuned(knresnet8().to(memory_format=torch.channels_last), 7)  # frozen but for the last layer
    before = torch.get_rng_state()
    again = from_folder(network, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(network.to(memory_format=torch.contiguous_format), again)


def test_to_the_hub_and_back(tmp_path, monkeypatch):
    uploads = tmp_path / "hub"
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id))

    def upload(self, repo_id, folder_path, revision, **options):
        Path(folder_path).rename(uploads)
        return f"https://huggingface.co/{repo_id}/commit/{revision}"

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    network = knresnet8()
    assert network.push_to_hub("me/net", branch="b", private=True) == "https://huggingface.co/me/net/commit/b"
    assert {file.name for file in uploads.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    assert 'HubModel.from_pretrained("me/net")' in (uploads / "README.md").read_text()

    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((*a, k)) or str(uploads))
    assert same(network, HubModel.from_pretrained("me/net", revision="b", token="t"))
    assert asked == [("me/net", {"revision": "b", "token": "t", "allow_patterns": [CONFIG, WEIGHTS]})]


def changed(name, layer):
    network = resnet8()
    network.set_submodule(name, layer)
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            lambda: changed("0.1.1", nn.Tanh()),
            r"not what resnet8 makes: 0.1.1 is Tanh\(\) in place of ReLU\(\); store",
        ),
        (lambda: changed("11", nn.Identity()), r"11 is Identity\(\) in place of Linear\(in_features=1024"),
        (lambda: changed("11", nn.Linear(1024, 3, False)), r"11 is Linear.*bias=False\) in place of Linear"),
        (lambda: changed("12", nn.Tanh()), r"12 is Tanh\(\) in place of nothing"),
        (lambda: kernel_normalize(resnet8())[0], r"0.0 is KNConv2d\(.*\) in place of Conv2d\("),
        (lambda: fine_tuned(resnet8(), 3), r"0.1.0 is FrozenBatchNorm2d\(.*\) in place of BatchNorm2d\("),
        (lambda: type(resnet8())(nn.Tanh()), "no function of knlightning.models has made this ResNet8; store its"),
    ],
)
def test_other_networks_are_not_stored(network, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        network().save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "os.system"},
            "holds no network of .* architecture must be one of convnext_tiny, ",
        ),
        ({"architecture": "resnet8"}, r"(?s)holds no network of this release .* for ResNet8:.*Missing key"),
        ({"model_args": {"classes": 3}}, "holds no network of this .* unexpected keyword argument 'classes'"),
        ({"model_args": {"activation": "os.system"}}, "activation must be one of .*, got 'os.system'"),
        ({"model_args": {"num_classes": 4}}, r"(?s)fc.weight: copying a param with shape torch.Size\(\[10, 64\]\)"),
        ({"model_args": {"weights": "imagenet1k_norm_torch"}}, "weights is no argument of what is stored"),
        ({"model_args": None}, "holds no network of this release .* must be a mapping"),
        ([], "holds no network of this release .*: 'list'"),
    ],
)
def test_wrong_configurations(change, message, tmp_path):
    knresnet8().save_pretrained(tmp_path)
    file = tmp_path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change if change else change))
    with pytest.raises(ValueError, match=message):
        HubModel.from_pretrained(tmp_path)


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/none/at/all is no folder, and no name on the Hub such as me/net"):
        HubModel.from_pretrained("/none/at/all")
    with pytest.raises(FileNotFoundError, match=CONFIG):
        HubModel.from_pretrained(tmp_path)
    knresnet8().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a KNResNet, which is no FCN"):
        type(fcn_knresnet8()).from_pretrained(tmp_path)
    config, weights = tmp_path / CONFIG, tmp_path / WEIGHTS
    text = config.read_bytes()
    config.write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="holds no network of this release of knlightning: 'utf-8'"):
        HubModel.from_pretrained(tmp_path)
    config.write_bytes(text)
    save_file(load_file(weights) | {"more": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r'(?s)Unexpected key\(s\) in state_dict: "more"'):
        HubModel.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged, or not of safetensors"):
        HubModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=rf"there is no file of weights .*{WEIGHTS}"):
        HubModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("package", ["huggingface_hub", "safetensors"])
def test_missing_packages(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    for act in (knresnet8().save_pretrained, knresnet8().push_to_hub, HubModel.from_pretrained):
        with pytest.raises(ImportError, match=rf"the Hub needs {package}: pip install 'knlightning\[hub\]'"):
            act("me/net")
