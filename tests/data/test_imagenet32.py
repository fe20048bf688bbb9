import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from standins import mapping, write_imagenet32

from knlightning.data import ImageNet32DataModule
from knlightning.data.image_cache import MappedImages

TRAIN = [f"train_data_batch_{number}" for number in range(1, 11)]
WNIDS = [f"n{number:08}" for number in range(1000)]
# the devkit's order is another than that of the sorted ids
DEVKIT = [WNIDS[(7 * place + 3) % 1000] for place in range(1000)]


def write_class_map(root):
    names = ["crane" if place in (133, 516) else f"name_{place}" for place in range(1000)]
    lines = [f"{wnid} {place} {name}" for place, (wnid, name) in enumerate(zip(DEVKIT, names, strict=True), 1)]
    (root / "map_clsloc.txt").write_text("\n".join(lines[::-1]) + "\n")  # the lines may come in any order


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images in folders, one of each class to train on and to validate on, and the pixels of the former."""
    root = tmp_path_factory.mktemp("folders")
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), np.uint8)
    for part in ("train", "val"):
        for wnid, image in zip(WNIDS, pixels, strict=True):
            (root / part / wnid).mkdir(parents=True)
            Image.fromarray(image).save(root / part / wnid / f"{wnid}_0.png", compress_level=0)
    return root, pixels


def module(root, cache=None, **arguments):
    return ImageNet32DataModule(root, cache, **arguments)


@pytest.mark.parametrize("pickles", [False, True])
def test_reads_every_image_and_label(tmp_path, pickles):
    contents = write_imagenet32(tmp_path, pickles)
    data = module(tmp_path)
    for train, names in ((True, TRAIN), (False, ["val_data"])):
        images, labels = data.read(train)
        expected = np.concatenate([contents[name]["data"] for name in names]).reshape(-1, 3, 32, 32)
        assert images.dtype == torch.uint8
        np.testing.assert_array_equal(images.numpy(), expected)  # red, green, blue planes
        assert labels.dtype == torch.int64
        assert labels.tolist() == [label - 1 for name in names for label in contents[name]["labels"]]
    assert data.class_names[0] == "class 1"
    assert data.num_classes == 1000


def test_npz_files_may_lie_in_the_root_itself(tmp_path):
    write_imagenet32(tmp_path)
    for folder in ("Imagenet32_train_npz", "Imagenet32_val_npz"):
        for file in (tmp_path / folder).iterdir():
            file.rename(tmp_path / file.name)
        (tmp_path / folder).rmdir()
    assert len(module(tmp_path).read(True)[0]) == 50


def test_folders_are_numbered_by_name_without_a_class_map(folders, tmp_path):
    root, pixels = folders
    data = module(root, tmp_path)
    images, labels = data.read(True)
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    assert labels.tolist() == list(range(1000))
    assert data.class_names == tuple(WNIDS)


def test_a_class_map_gives_folders_the_devkits_order_and_names(folders, tmp_path):
    root, pixels = folders
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(root / part)
    write_class_map(tmp_path)
    data = module(tmp_path)
    for train in (True, False):
        images, labels = data.read(train)
        np.testing.assert_array_equal(images[5].permute(1, 2, 0).numpy(), pixels[5])
        assert [DEVKIT[label] for label in labels] == WNIDS
    assert data.class_names[:2] == ("name_0", "name_1")
    assert (data.class_names[133], data.class_names[516]) == ("crane", "crane (2)")
    (tmp_path / "val").unlink()
    (tmp_path / "val").mkdir()
    for wnid in (*WNIDS[1:], "n99999999"):
        (tmp_path / "val" / wnid).mkdir()
        (tmp_path / "val" / wnid / "a.png").symlink_to(root / "val" / WNIDS[1] / f"{WNIDS[1]}_0.png")
    with pytest.raises(ValueError, match=r"map_clsloc\.txt: does not have the folders n99999999"):
        data.read(False)


def test_a_class_map_names_the_classes_of_files_and_leaves_their_order(tmp_path):
    contents = write_imagenet32(tmp_path)
    write_class_map(tmp_path)
    data = module(tmp_path)
    assert data.read(False)[1].tolist() == [label - 1 for label in contents["val_data"]["labels"]]
    assert data.class_names[2] == "name_2"


def test_parts_in_different_orders_are_refused(folders, tmp_path):
    root, _ = folders
    write_imagenet32(tmp_path)
    (tmp_path / "Imagenet32_val_npz" / "val_data.npz").unlink()
    (tmp_path / "val").symlink_to(root / "val")
    for train in (True, False):
        with pytest.raises(ValueError, match="numbered in different orders"):
            module(tmp_path).read(train)
    lines = [f"{wnid} {place} name" for place, wnid in enumerate(DEVKIT, 1)]
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines))
    assert module(tmp_path).read(True)[1].shape == (50,)


@pytest.mark.parametrize("pickles", [False, True])
def test_missing_files_are_named(tmp_path, pickles):
    with pytest.raises(FileNotFoundError, match=rf"no train images of ImageNet 32x32 in {tmp_path}.*Set root to"):
        module(tmp_path).setup("fit")
    write_imagenet32(tmp_path, pickles)
    folder = tmp_path if pickles else tmp_path / "Imagenet32_train_npz"
    names = [f"{name}{'' if pickles else '.npz'}" for name in (TRAIN[2], TRAIN[9])]
    for name in names:
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"^{', '.join(names)} missing in {folder}, where others of the 10"):
        module(tmp_path).setup("fit")


def test_the_cache_is_written_once_and_anew_when_the_data_change(tmp_path):
    write_imagenet32(tmp_path, pickles=True)
    [before] = {module(tmp_path, tmp_path / "cache").read(False)[0].sum().item() for _ in range(2)}
    [first] = (tmp_path / "cache").iterdir()
    written = first.stat().st_mtime_ns
    module(tmp_path, tmp_path / "cache").read(False)
    assert first.stat().st_mtime_ns == written
    content = {"data": np.ones((3, 3072), np.uint8), "labels": [1, 2, 3]}
    (tmp_path / "val_data").write_bytes(pickle.dumps(content, protocol=2))
    images, labels = module(tmp_path, tmp_path / "cache").read(False)
    assert (images.sum().item(), labels.tolist()) == (3 * 3072, [0, 1, 2])
    assert before != images.sum().item()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_cache_is_an_ordinary_npy_file(tmp_path):
    contents = write_imagenet32(tmp_path)
    module(tmp_path).prepare_data()
    assert sorted(path.name.split("-")[1] for path in tmp_path.glob("*.npy")) == ["train", "val"]
    [path] = tmp_path.glob("imagenet32-val-*.npy")
    records = np.load(path)
    np.testing.assert_array_equal(records["image"].reshape(-1, 3072), contents["val_data"]["data"])
    np.testing.assert_array_equal(records["label"] + 1, contents["val_data"]["labels"])


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path):
    write_imagenet32(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the images cannot be written .*Set cache_dir to"):
        module(tmp_path, tmp_path / "file" / "cache").setup("test")


def test_only_what_a_stage_needs_is_converted(tmp_path):
    write_imagenet32(tmp_path)

    def converted(stage, **arguments):
        data = module(tmp_path, **arguments)
        data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        data.trainer.state.fn = stage
        data.prepare_data()
        names = {path.name.split("-")[1] for path in tmp_path.glob("*.npy")}
        for path in tmp_path.glob("*.npy"):
            path.unlink()
        return names

    assert converted("fit") == {"train", "val"}
    assert converted("fit", val_split=0.5) == {"train"}
    assert converted("validate") == converted("test") == converted("test", val_split=0.5) == {"val"}
    assert converted("validate", val_split=0.5) == {"train"}
    assert converted("predict") == set()


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="asks Linux how memory is shared")
@pytest.mark.parametrize("val_split", [0.0, 0.5])
def test_processes_share_the_file_in_memory(tmp_path, val_split):
    """What is mapped from a file and never written to is the same memory in all processes, be they workers or ranks."""
    write_imagenet32(tmp_path, rows=200)
    data = module(tmp_path, batch_size=100, val_split=val_split)
    data.setup("fit")
    [path] = tmp_path.glob("imagenet32-train-*.npy")
    dataset = data.train_dataloader().dataset
    assert isinstance(dataset, MappedImages)
    assert len(dataset) == 2000 * (1 - val_split)
    for _ in data.train_dataloader():
        pass
    dataset.__getitems__(list(range(len(dataset))))  # this process reads all of them too
    file, private = mapping(dataset.images.data_ptr())
    assert (Path(file), private) == (path, 0)
    # a worker that is not forked is sent the name of the file, not the images
    sent = ForkingPickler.dumps(dataset)
    assert len(sent) < 10_000
    copy = pickle.loads(sent)
    assert Path(mapping(copy.images.data_ptr())[0]) == path
    assert torch.equal(copy[3][0], dataset[3][0])


def test_augmentation_is_a_choice(tmp_path):
    write_imagenet32(tmp_path)
    images, _ = module(tmp_path).read(True)
    plain, varied = (module(tmp_path, augment=augment, scaling="standard") for augment in (False, True))
    torch.manual_seed(0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(plain.prepared(images, train=True), (images / 255 - mean) / std)
    assert not torch.equal(varied.prepared(images, train=True), plain.prepared(images, train=True))
    assert torch.equal(varied.prepared(images, train=False), plain.prepared(images, train=False))
