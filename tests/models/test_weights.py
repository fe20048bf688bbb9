import pickle
from pathlib import Path

import published
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from knlightning.models import kernel_normalize, knresnet8, knresnet18, load_weights, resnet8, resnet18
from knlightning.models.norm_torch import norm_torch_names
from knlightning.models.weights import last_layer


def equal(network, state):
    return {name for name, tensor in network.state_dict().items() if name in state and torch.equal(tensor, state[name])}


FORMS = {
    "alone": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 99},
    "state_dict": lambda state: {"state_dict": state},
    "parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "run": lambda state: {
        "state_dict": {f"backbone.{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.6.0",
        "global_step": 1,
    },
}


@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
def test_all_but_the_last_layer_comes_from_a_file(form, tmp_path):
    state, network = knresnet8(num_classes=10).state_dict(), knresnet8(num_classes=3)
    path = tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(FORMS[form](state), path)
    head = {"fc.weight", "fc.bias"}
    loaded = load_weights(network, path)
    assert set(loaded.taken) == equal(network, state) == set(state) - head
    assert set(loaded.anew) == set(loaded.skipped) == head
    assert str(loaded) == "18 tensors taken; new: fc.weight, fc.bias"
    assert str(load_weights(knresnet8(num_classes=10), path, whole=True)) == "20 tensors taken"


def test_networks_of_others():
    state = torchvision.models.resnet18(num_classes=4).state_dict()
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    ours = resnet18(num_classes=4)
    assert len(load_weights(ours, old).taken) == len(old)
    theirs = timm.create_model("resnet18", num_classes=4)
    load_weights(theirs, state, whole=True)
    ours.load_state_dict(state)
    torch.testing.assert_close(theirs.eval()(torch.ones(1, 3, 32, 32)), ours.eval()(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize(
    ("name", "rest"), [("resnet10t", "kernel"), ("resnetv2_18", "kernel"), ("resnetv2_18", "group")]
)
def test_converted_network_takes_the_weights_of_the_original(name, rest):
    original = timm.create_model(name, num_classes=4)
    converted, report = kernel_normalize(original, rest=rest)
    expected = converted.state_dict()
    for parameter in converted.parameters():
        nn.init.zeros_(parameter)
    loaded = load_weights(converted, original.state_dict())
    assert {name for name in loaded.anew if not name.endswith(".bias")} == set()
    assert {name.rpartition(".")[0] for name in loaded.skipped} >= set(report.norms)
    assert "; new: " in str(loaded)
    assert " more; skipped: " in str(loaded)
    assert equal(converted, expected) == set(expected)


def test_published_names():
    model, state = knresnet18(), published.state("knresnet18")
    load_weights(model, {"model": state, "epoch": 99}, whole=True)
    own = model.state_dict()
    for theirs, ours in norm_torch_names(model).items():
        assert torch.equal(own[ours], state[theirs])
    small = knresnet18(num_classes=3)
    assert load_weights(small, state).anew == ("fc.weight", "fc.bias")
    with pytest.raises(ValueError, match="imagenet1k_norm_torch are weights of knresnet18, 34 and 50, not of"):
        load_weights(resnet8(), "imagenet1k_norm_torch")


def test_all_problems_are_listed_and_the_model_stays():
    state = published.state("knresnet18")
    del state["res_block3.conv1.bias"], state["fc.weight"]
    state["extra.weight"] = torch.ones(1)
    state["block0.0.weight"] = torch.ones(64, 3, 3, 3)
    state["fc.bias"] = 3
    model = knresnet18()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        load_weights(model, {"model": state}, whole=True)
    assert str(caught.value).splitlines()[1:] == [
        "  misshapen: stem.0.weight is (64, 3, 3, 3), needed (64, 3, 7, 7)",
        "  missing: stages.1.0.conv1.bias",
        "  missing: fc.weight",
        "  not a tensor: fc.bias is a int",
        "  extra: extra.weight",
    ]
    assert equal(model, before) == set(before)


def test_files_that_are_no_checkpoint(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    with (tmp_path / "attack.pth").open("wb") as file:
        pickle.dump({"model": Attack()}, file, protocol=2)
    (tmp_path / "damaged.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "damaged.safetensors").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    torch.save({f"layer{number}.weight": torch.zeros(1) for number in range(40)}, tmp_path / "other.pth")
    model = nn.Linear(1, 1)
    with pytest.raises(FileNotFoundError, match=r"no file of weights .*absent.pth"):
        load_weights(model, tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="but a folder: name a file in it"):
        load_weights(model, tmp_path)
    for name, said in (
        ("attack.pth", r"attack.pth is damaged, .*: it holds more than tensors and plain values.* save the state_dict"),
        ("damaged.pth", r"damaged.pth is damaged, or not a checkpoint: it holds more"),
        ("damaged.safetensors", r"damaged.safetensors is damaged, or not of safetensors"),
        ("list.pth", "holds a list"),
        ("empty.pth", "empty.pth holds no weights"),
        ("other.pth", r"does not fit this Linear; (.*\n){13}  and 28 more$"),
    ):
        with pytest.raises(ValueError, match=said):
            load_weights(model, tmp_path / name)
    assert not (tmp_path / "attacked").exists()


def test_last_layer():
    assert last_layer(nn.ReLU()) is None
    for model in (torchvision.models.squeezenet1_1(), torchvision.models.efficientnet_b0(), knresnet8()):
        head = last_layer(model)
        assert head.weight.shape[0] == (10 if hasattr(model, "stages") else 1000)
