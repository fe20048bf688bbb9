import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from standins import RandomData, TinyFCN, TinyNet, tiny_config, write_image_folder

import knlightning
from knlightning.callbacks import BestCheckpoint, LastCheckpoint, RunConfig
from knlightning.data import DigitScenesDataModule, ImageFolderDataModule
from knlightning.models import HubModel, resnet8
from knlightning.tasks import ClassificationTask, SegmentationTask, segmentation
from knlightning.tasks.inference import by_tiles


def save(run, task, data, config):
    """Write a checkpoint as knl fit does, without training."""
    callbacks = [RunConfig(yaml.safe_dump(config), config), LastCheckpoint(), BestCheckpoint()]
    trainer = Trainer(default_root_dir=run, logger=False, callbacks=callbacks, accelerator="cpu", barebones=False)
    trainer.strategy.connect(task)
    if data is not None:
        data.trainer = trainer
        trainer.datamodule = data
    task.trainer = trainer
    trainer.save_checkpoint(run / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run that was trained on a folder of images, and the task."""
    root = tmp_path_factory.mktemp("load")
    write_image_folder(root / "images")
    config = tiny_config()
    config["model"]["init_args"]["eval_flip"] = True
    config["model"]["init_args"]["backbone"]["init_args"] = {"num_classes": 2}
    settings = {"root": str(root / "images"), "eval_resize": 24, "eval_size": 16, "num_workers": 0}
    config["data"] = {"class_path": "knlightning.data.ImageFolderDataModule", "init_args": settings}
    data = ImageFolderDataModule(**settings)
    data.setup("validate")
    task = ClassificationTask(TinyNet(2), eval_flip=True)
    save(root / "run", task, data, config)
    return root, task.eval(), data


@pytest.mark.parametrize("form", ["folder", "files", "pillow", "array", "tensor", "several tensors"])
def test_predictions_are_those_of_the_trainer(folders, form):
    root, task, data = folders
    data.predict_dir = str(root / "images" / "val")
    data.trainer = None
    data.setup("predict")
    paths = [path for _, batch in data.predict_dataloader() for path in batch]
    (images, _) = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)
    expected = task.predict_step((images, paths), 0)
    opened = [Image.open(path) for path in paths]
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in opened]
    given = {
        "folder": data.predict_dir,
        "files": paths,
        "pillow": opened,
        "array": [np.array(image) for image in opened],
        "tensor": tensors[0],
        "several tensors": torch.stack(tensors),
    }[form]
    model = knlightning.load(root / "run")
    found = model.predict(given, batch_size=4)
    assert len(found) == (1 if form == "tensor" else 6)
    for prediction, probabilities in zip(found, expected, strict=False):
        assert list(prediction.probabilities.values()) == pytest.approx(
            probabilities.sort(descending=True).values.tolist()
        )
        assert prediction.label == ("cat", "dog")[probabilities.argmax()]
        assert prediction.probability == prediction.probabilities[prediction.label]
    assert model.classes == ["cat", "dog"]
    assert torch.equal(model.network.head.weight, task.backbone.head.weight)


def test_images_of_other_types_are_refused(folders):
    with pytest.raises(ValueError, match=r"uint8.*float32"):
        knlightning.load(folders[0] / "run").predict(torch.rand(3, 8, 8))


def test_scenes_keep_their_size_and_large_ones_are_predicted_by_tiles(tmp_path, monkeypatch):
    cut = []
    monkeypatch.setattr(segmentation, "LARGEST_WHOLE", 9 * 14 - 1)
    monkeypatch.setattr(segmentation, "by_tiles", lambda *args: cut.append(args) or by_tiles(*args, tile=8, margin=2))
    config = tiny_config()
    backbone = {"class_path": "standins.TinyFCN", "init_args": {"num_classes": 11}}
    config["model"] = {"class_path": "knlightning.tasks.SegmentationTask", "init_args": {"backbone": backbone}}
    config["data"] = {"class_path": "knlightning.data.DigitScenesDataModule", "init_args": {"scaling": "standard"}}
    task = SegmentationTask(TinyFCN(11)).eval()
    save(tmp_path, task, None, config)
    image = torch.randint(256, (3, 9, 14), dtype=torch.uint8)
    (prediction,) = knlightning.load(tmp_path / "checkpoints" / "last.ckpt").predict(image)
    assert cut
    prepared = DigitScenesDataModule(scaling="standard").prepared(image[None], train=False)
    assert torch.equal(prediction.label_map, task(prepared)[0].argmax(dim=0))


def test_tasks_are_loaded_with_their_arguments(folders):
    root, task, _ = folders
    path = root / "run" / "checkpoints" / "last.ckpt"
    loaded = ClassificationTask.load_from_checkpoint(path)
    assert torch.equal(loaded.backbone.head.weight, task.backbone.head.weight)
    optimizer = loaded.make_optimizer(loaded.parameters())
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.SGD, 0.5)
    own = TinyNet(2)
    assert ClassificationTask.load_from_checkpoint(path, backbone=own).backbone is own
    assert ClassificationTask.load_from_checkpoint(path, label_smoothing=0.25).label_smoothing == 0.25
    with pytest.raises(ValueError, match="ClassificationTask, which is no SegmentationTask"):
        SegmentationTask.load_from_checkpoint(path)


def test_networks_of_runs_go_to_the_hub(tmp_path):
    config = tiny_config()
    settings = {"num_classes": 10, "dropout_p": 0.0}
    config["model"]["init_args"]["backbone"] = {"class_path": "knlightning.models.resnet8", "init_args": settings}
    task = ClassificationTask(resnet8(**settings))
    save(tmp_path / "run", task, RandomData(), config)
    knlightning.load(tmp_path / "run").network.save_pretrained(tmp_path / "hub")
    state = HubModel.from_pretrained(tmp_path / "hub").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in task.backbone.state_dict().items())


def test_what_is_no_run_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint .*, and none in it"):
            knlightning.load(path)
    save(tmp_path, ClassificationTask(TinyNet(3)), RandomData(), {})
    with pytest.raises(ValueError, match="not written by knl fit"):
        knlightning.load(tmp_path)


def test_folders_of_the_package_are_imported_when_they_are_used():
    code = (
        "import sys, knlightning; assert 'torch' not in sys.modules; knlightning.nn.KNConv2d; knlightning.load;"
        " assert {'nn', 'load'} <= {*dir(knlightning)}; assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="'knlightning' has no attribute 'nothing'"):
        knlightning.nothing  # noqa: B018
