import pickle
from pathlib import Path

import published
import pytest
import torch

from knlightning.models import knresnet8, knresnet18, knresnet34, knresnet50, load_norm_torch_weights
from knlightning.models.norm_torch import norm_torch_names

MODELS = {"knresnet18": knresnet18, "knresnet34": knresnet34, "knresnet50": knresnet50}


def published_state(name):
    return {key: torch.randn(shape) for key, shape in published.KEYS[name]}


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_order_are_the_published_ones(name):
    with torch.device("meta"):
        model = MODELS[name](num_classes=1000)
    own = model.state_dict()
    ours = [(theirs, list(own[mine].shape)) for theirs, mine in norm_torch_names(model).items()]
    assert ours == [(key, shape) for key, shape in published.KEYS[name]]


@pytest.mark.parametrize("nested", [True, False])
def test_weights_arrive_from_a_file(tmp_path, nested):
    state = published_state("knresnet18")
    torch.save({"model": state, "epoch": 99} if nested else state, tmp_path / "knresnet18.pth")
    model = knresnet18()
    load_norm_torch_weights(model, tmp_path / "knresnet18.pth")
    assert torch.equal(model.stem[0].weight, state["block0.0.weight"])
    assert torch.equal(model.fc.bias, state["fc.bias"])
    own = model.state_dict()
    for theirs, ours in norm_torch_names(model).items():
        assert torch.equal(own[ours], state[theirs])


def test_all_problems_are_listed_and_the_model_stays(tmp_path):
    state = published_state("knresnet18")
    del state["res_block3.conv1.bias"], state["fc.weight"]
    state["extra.weight"] = torch.ones(1)
    state["block0.0.weight"] = torch.ones(64, 3, 3, 3)
    state["fc.bias"] = 3  # type: ignore[assignment]
    model = knresnet18()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        load_norm_torch_weights(model, {"model": state})
    for problem in (
        "missing: res_block3.conv1.bias",
        "missing: fc.weight",
        "extra: extra.weight",
        "misshapen: block0.0.weight is (64, 3, 3, 3), needed (64, 3, 7, 7)",
        "not a tensor: fc.bias is a int",
    ):
        assert problem in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_files_that_are_no_checkpoint(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    with (tmp_path / "attack.pth").open("wb") as file:
        pickle.dump({"model": Attack()}, file)
    (tmp_path / "damaged.pth").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    model = knresnet18()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent.pth"):
        load_norm_torch_weights(model, tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"attack.pth .*not loaded"):
        load_norm_torch_weights(model, tmp_path / "attack.pth")
    assert not (tmp_path / "attacked").exists()
    with pytest.raises(ValueError, match=r"damaged.pth"):
        load_norm_torch_weights(model, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_norm_torch_weights(model, tmp_path / "list.pth")


def test_a_network_without_kernel_normalization_is_refused():
    with pytest.raises(ValueError, match='norm="kernel"'):
        load_norm_torch_weights(knresnet8(norm="batch"), {})
