from urllib.error import URLError

import published
import pytest
import torch

from knlightning.models import (
    KNResNet18_Weights,
    KNResNet34_Weights,
    KNResNet50_Weights,
    knresnet8,
    knresnet18,
    knresnet34,
    knresnet50,
)
from knlightning.models.norm_torch import norm_torch_names

MODELS = {
    "knresnet18": (knresnet18, KNResNet18_Weights),
    "knresnet34": (knresnet34, KNResNet34_Weights),
    "knresnet50": (knresnet50, KNResNet50_Weights),
}
WEIGHTS = KNResNet18_Weights.IMAGENET1K_NORM_TORCH


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_order_are_the_published_ones(name):
    make, weights = MODELS[name]
    with torch.device("meta"):
        model = make(num_classes=1000)
    own = model.state_dict()
    ours = [(theirs, list(own[mine].shape)) for theirs, mine in norm_torch_names(model).items()]
    assert ours == [(key, shape) for key, shape in published.KEYS[name]]
    assert model.weights_enum is weights
    (only,) = weights
    assert only.meta["num_params"] == sum(p.numel() for p in model.parameters())
    assert only.meta["file"] == f"{name}_imagenet.pth"
    assert only.transforms()(torch.zeros(3, 300, 300, dtype=torch.uint8)).shape == (3, 224, 224)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path


def test_weights_are_downloaded_once(cache, monkeypatch):
    urls = []

    def download(url, path):
        urls.append(url)
        torch.save({"model": published.state("knresnet18"), "epoch": 99}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    model = knresnet18(weights="imagenet1k_norm_torch")
    knresnet18(weights="imagenet1k_norm_torch", num_classes=10)
    assert urls == [WEIGHTS.url]
    assert torch.equal(model.stem[0].weight, WEIGHTS.get_state_dict()["model"]["block0.0.weight"])


@pytest.mark.parametrize("page", [None, b"<html>Too many users have viewed this file</html>"])
def test_without_a_network_it_is_said_which_file_goes_where(cache, monkeypatch, page):
    def download(url, path):
        if page is None:
            raise URLError("no network")
        WEIGHTS.file.write_bytes(page)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(OSError, match=r"Download it .* from https://drive.*1oU4IG.* and put it at .*knresnet18_imag"):
        knresnet18(weights="imagenet1k_norm_torch")
    assert not WEIGHTS.file.exists()


def test_a_network_without_kernel_normalization_is_refused():
    for model in (knresnet8(norm="batch"), torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match='norm="kernel"'):
            norm_torch_names(model)
