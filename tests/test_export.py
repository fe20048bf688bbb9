import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from standins import PROJECT, TinyNet, tiny_config, weights, write_config
from torch import nn

from knlightning import export as exporting
from knlightning.cli import main, run
from knlightning.data import DigitScenesDataModule, DigitsDataModule
from knlightning.export import FORMATS, export, preprocessing_of
from knlightning.models import fcn_knresnet8, knresnet8

FILES = {"weights.pt", "weights.safetensors", "model.pt2", "model.onnx", "preprocessing.json"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with tiny.yaml and one short run of it, runs/tiny/0."""
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    write_config(folder / "tiny.yaml", tiny_config(max_epochs=1, limit_train_batches=3, limit_val_batches=1))
    main(["fit", "--config", "tiny.yaml"])
    os.chdir(before)
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["export", "--config", "tiny.yaml", *args])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_every_format_from_the_command_line(folder, capsys):
    import onnxruntime
    from safetensors.torch import load_file

    before = {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}
    args = ["--config", "runs/tiny/0/config.yaml", "--ckpt_path", "best", "--to", "out", "--format", *FORMATS]
    main(["export", *args, "--trainer.accelerator", "gpu"])  # the training's devices do not matter
    printed = capsys.readouterr().out
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == FILES
    for name in FILES - {"preprocessing.json"}:
        assert f"out/{name}: largest difference from the network " in printed
    assert "trainer.accelerator: cpu -> gpu" in printed
    assert printed.count("->") == 2  # this one and the heading
    assert before == {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}

    stored = weights(folder / "runs" / "tiny" / "0" / "checkpoints" / "best.ckpt")
    state = {name.removeprefix("backbone."): tensor for name, tensor in stored.items()}
    torch.testing.assert_close(torch.load(out / "weights.pt", weights_only=True), state, rtol=0, atol=0)
    torch.testing.assert_close(load_file(out / "weights.safetensors"), state, rtol=0, atol=0)
    network = TinyNet().eval()
    network.load_state_dict(state)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(out / "model.pt2").module()
    for count in (1, 2, 5):
        images = torch.rand(count, 3, 32, 32)
        with torch.no_grad():
            expected = network(images)
        torch.testing.assert_close(program(images).detach(), expected)
        torch.testing.assert_close(torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), expected)
    assert json.loads((out / "preprocessing.json").read_text()) == {
        "input": "images: float32, (N, 3, height, width), RGB",
        "output": "logits: float32, (N, classes); softmax gives probabilities",
        "image_size": [32, 32],
        "resize": None,
        "scaling": "unit",
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "classes": list("0123456789"),
    }


@pytest.mark.parametrize(
    ("args", "files"),
    [
        ([], {"weights.pt"}),
        (["--format", "safetensors"], {"weights.safetensors"}),
        (["--format", "state_dict", "--format", "safetensors"], {"weights.pt", "weights.safetensors"}),
        (["--model.compile", "true", "--format", "torch_export"], {"model.pt2"}),
    ],
)
def test_formats_that_are_asked_for(folder, args, files):
    main(["export", "--config", "tiny.yaml", "--ckpt_path", "last", "--to", "a/b", *args])
    assert {path.name for path in (folder / "a" / "b").iterdir()} == files | {"preprocessing.json"}


def test_scaling_is_described_as_the_datamodule_does_it():
    data = DigitsDataModule(scaling="standard")
    described = preprocessing_of(data)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    scaled = (images / 255 - torch.tensor(described["mean"])[:, None, None]) / torch.tensor(described["std"])[
        :, None, None
    ]
    torch.testing.assert_close(scaled, data.on_after_batch_transfer((images, None), 0)[0])


def test_names_of_classes_come_from_the_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            Image.new("RGB", (20, 24), "white").save(tmp_path / "pets" / part / name / "0.png")
    config = tiny_config(max_epochs=1)
    config["model"]["init_args"]["backbone"]["init_args"] = {"num_classes": 2}
    sizes = {"train_size": 16, "eval_resize": 18, "eval_size": 16, "num_workers": 0}
    config["data"] = {
        "class_path": "knlightning.data.ImageFolderDataModule",
        "init_args": {"root": "pets", "batch_size": 2, **sizes},
    }
    write_config(tmp_path / "pets.yaml", config)
    main(["fit", "--config", "pets.yaml"])
    shutil.rmtree(tmp_path / "pets")
    main(["export", "--config", "pets.yaml", "--ckpt_path", "last", "--to", "out"])
    described = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert described["classes"] == ["cat", "dog"]
    assert (described["resize"], described["image_size"]) == (18, [16, 16])


@pytest.mark.slow
def test_segmentation(tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    size = "--data.image_size=[32, 40]"
    config = ["--config", str(PROJECT / "configs" / "scenes_fcn_knresnet.yaml"), size]
    few = [f"--data.{part}_scenes=8" for part in ("train", "eval")]
    main(["fit", *config, *few, "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--pictures.every_n_epochs=0"])
    main(["export", *config, "--ckpt_path", "last", "--to", "out", "--format", "state_dict", "onnx"])
    network = fcn_knresnet8().eval()
    network.load_state_dict(torch.load("out/weights.pt", weights_only=True))
    session = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    images = torch.rand(2, 3, 32, 40)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    assert logits.shape == (2, 11, 32, 40)
    torch.testing.assert_close(torch.from_numpy(logits), network(images).detach(), rtol=1e-4, atol=1e-4)
    described = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    palette = described.pop("palette")
    assert [tuple(colour) for colour in palette] == list(DigitScenesDataModule.palette)
    assert described == {
        "input": "images: float32, (N, 3, height, width), RGB",
        "output": "logits: float32, (N, classes, height, width), for each pixel; softmax gives probabilities",
        "image_size": [32, 40],
        "scaling": "unit",
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "classes": ["ground", *"0123456789"],
        "label_ids": list(range(11)),
    }


@pytest.mark.slow
def test_kernel_normalized_network(tmp_path):
    model = knresnet8(num_classes=10).to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    differences = export(model, tmp_path / "out", list(FORMATS), (32, 32), {})
    assert set(differences) == FILES - {"preprocessing.json"}
    assert max(differences.values()) < 1e-5
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.training


# what is refused, and leaves nothing


class Undecided(TinyNet):
    """Cannot be traced: what it does depends on the values of the images."""

    def forward(self, images):
        return super().forward(images) if images.mean() > 0.1 else super().forward(-images)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Undecided(), "--format torch_export: this network cannot be written so"),
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
    def write(model, images, path):
        torch.save({name: tensor for name, tensor in model.state_dict().items() if "head" in name}, path)

    class Lenient(nn.Sequential):
        def load_state_dict(self, state, strict=True, assign=False):
            return super().load_state_dict(state, strict=False)

    monkeypatch.setitem(FORMATS, "state_dict", replace(FORMATS["state_dict"], write=write))
    with pytest.raises(ValueError, match=r"weights.pt differs"):
        export(Lenient(nn.Flatten(), nn.Linear(12, 2)), tmp_path / "out", ["state_dict"], (2, 2), {})


def test_missing_packages_are_named(folder, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    message = refused(capsys, "--ckpt_path", "last", "--to", "out", "--format", "state_dict", "onnx")
    assert "--format onnx needs onnx, onnxruntime, onnxscript: pip install 'knlightning[export]'" in message
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--ckpt_path", "last"], "--to is needed"),
        (["--to", "out"], "--ckpt_path is needed"),
        (["--to", "out", "--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--to", "runs", "--ckpt_path", "last"], "--to runs exists and is not an empty directory"),
        (["--to", "tiny.yaml", "--ckpt_path", "last"], "--to tiny.yaml exists"),
        (["--to", "out", "--ckpt_path", "last", "--format", "tensorflow"], "tensorflow"),
        (["--to", "out", "--ckpt_path", "last", "--model.backbone.num_classes", "7"], "backbone.head.weight"),
    ],
)
def test_requests_that_cannot_be_met(folder, capsys, args, said):
    before = sorted(path for path in folder.rglob("*"))
    assert said in refused(capsys, *args)
    assert sorted(path for path in folder.rglob("*")) == before


def test_help_begins_with_what_matters(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.index("--to") < text.index("--format") < text.index("--trainer.")


def test_averaged_weights_are_exported(folder):
    ema = {"class_path": "knlightning.callbacks.EMA", "init_args": {"decay": 0.9}}
    write_config(folder / "ema.yaml", tiny_config(max_epochs=1, limit_train_batches=3, callbacks=[ema]))
    cli = run(["fit", "--config", "ema.yaml"])
    main(["export", "--config", "ema.yaml", "--ckpt_path", "last", "--to", "out"])
    exported = torch.load(folder / "out" / "weights.pt", weights_only=True)
    torch.testing.assert_close(exported, dict(cli.model.backbone.state_dict()), rtol=0, atol=0)
