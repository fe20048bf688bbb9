import json
import shutil

import pytest
import torch
from commands.runs import help_text, refused
from PIL import Image
from standins import PROJECT, TinyNet, tiny_config, weights, write_config

from knlightning.commands.main import main
from knlightning.data import DigitScenesDataModule
from knlightning.export import FORMATS
from knlightning.models import fcn_knresnet8

FILES = {"weights.pt", "weights.safetensors", "model.pt2", "model.onnx", "preprocessing.json"}

TEXTS = ("input", "output", "resize_filter", "scaling")


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
    preprocessing = json.loads((out / "preprocessing.json").read_text())
    texts = session.get_modelmeta().custom_metadata_map  # the file alone says how to use it
    assert {key: text if key in TEXTS else json.loads(text) for key, text in texts.items()} == preprocessing
    assert preprocessing == {
        "input": "images: float32, (N, 3, height, width), RGB",
        "output": "logits: float32, (N, classes); softmax gives probabilities",
        "image_size": [32, 32],
        "resize": None,
        "resize_filter": "bilinear, with antialiasing, as PIL.Image.Resampling.BILINEAR",
        "scaling": "unit",
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "range": [0.0, 1.0],
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
        "range": [0.0, 1.0],
        "classes": ["ground", *"0123456789"],
        "label_ids": list(range(11)),
    }


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--ckpt_path", "last"], "--to is needed"),
        (["--to", "out"], "--ckpt_path is needed"),
        (["--to", "out", "--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--to", "runs", "--ckpt_path", "last"], "--to must be a new or an empty directory, got 'runs'"),
        (["--to", "tiny.yaml", "--ckpt_path", "last"], "--to must be a new or an empty directory, got 'tiny.yaml'"),
        (["--to", "out", "--ckpt_path", "last", "--format", "tensorflow"], "tensorflow"),
        (["--to", "out", "--ckpt_path", "last", "--model.backbone.num_classes", "7"], "backbone.head.weight"),
    ],
)
def test_requests_that_cannot_be_met(folder, capsys, args, said):
    before = sorted(path for path in folder.rglob("*"))
    assert said in refused(capsys, "export", "--config", "tiny.yaml", *args)
    assert sorted(path for path in folder.rglob("*")) == before


def test_help_begins_with_what_matters(capsys):
    text = "\n".join(help_text(capsys, "export"))
    assert text.index("--to") < text.index("--format") < text.index("--trainer.")
