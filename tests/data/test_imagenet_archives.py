import hashlib
import io
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets.imagenet import ARCHIVE_META

from knlightning.data import ImageNetDataModule, imagenet_archives
from knlightning.data.imagenet_archives import ARCHIVES, find_flat, read_val_classes, unpack

WNIDS = ["n00000003", "n00000001", "n00000002"]  # by their numbers in the devkit, which are not in order
TRUTH = [2, 3, 1, 1]


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def tar_bytes(folder, files):
    path = write_tar(folder / "inner.tar", files)
    content = path.read_bytes()
    path.unlink()
    return content


def state(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


TRAIN = {f"{wnid}/{wnid}_{n}.JPEG": f"{wnid} {n}".encode() * 300 for wnid in sorted(WNIDS) for n in (7, 1234)}
VAL = {f"{WNIDS[c - 1]}/ILSVRC2012_val_{n:08d}.JPEG": b"%d" % n * 100 for n, c in enumerate(TRUTH, 1)}


@pytest.fixture
def register(monkeypatch):
    """Takes an archive for the official one."""
    monkeypatch.setattr(imagenet_archives, "NUM_CLASSES", 3)

    def take(split, path, images):
        content = path.read_bytes()
        archive = replace(ARCHIVES[split], md5=hashlib.md5(content).hexdigest(), size=len(content), images=images)
        monkeypatch.setitem(imagenet_archives.ARCHIVES, split, archive)

    return take


@pytest.fixture
def archives(tmp_path, register):
    """Tiny archives of the official form."""
    folder = tmp_path / "archives"
    folder.mkdir()
    inner = {wnid: {k.split("/")[1]: v for k, v in TRAIN.items() if k.startswith(wnid)} for wnid in WNIDS}
    write_tar(folder / ARCHIVES["train"].file, {f"{w}.tar": tar_bytes(tmp_path, files) for w, files in inner.items()})
    write_tar(folder / ARCHIVES["val"].file, dict(sorted((k.split("/")[1], v) for k, v in VAL.items())))
    rows = [(n, wnid, "words", 0) for n, wnid in enumerate(WNIDS, 1)] + [(4, "n00000004", "a group", 3)]
    fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, fields)})
    data = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, TRUTH)).encode()}
    kit = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in data.items()}
    write_tar(folder / ARCHIVES["devkit"].file, kit, "w:gz")
    for split, images in (("train", 6), ("val", 4), ("devkit", 0)):
        register(split, folder / ARCHIVES[split].file, images)
    return folder


def test_names_and_sums_are_those_of_torchvision():
    assert {split: (archive.file, archive.md5) for split, archive in ARCHIVES.items()} == ARCHIVE_META


def test_archives_become_folders_of_classes(archives, tmp_path):
    assert read_val_classes(archives) == ["n00000001", "n00000002", "n00000003", "n00000003"]
    said = []
    for _ in range(2):  # the second time they are only checked
        for split, files in (("train", TRAIN), ("val", VAL)):
            unpack(split, archives, tmp_path / "root", said.append)
            assert state(tmp_path / "root" / split) == files
    assert (
        said[2:]
        == said[:2]
        == [f"{tmp_path}/root/train: 6 images in 3 classes", f"{tmp_path}/root/val: 4 images in 3 classes"]
    )
    assert sorted(os.listdir(tmp_path / "root")) == ["train", "val"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_interrupt_costs_what_was_not_written(archives, tmp_path, monkeypatch, split):
    written = []
    copy = imagenet_archives.shutil.copyfileobj

    def interrupted(source, target, *args):
        written.append(os.path.basename(target.name))
        if len(written) == 3:
            target.write(b"a part")
            raise KeyboardInterrupt
        copy(source, target, *args)

    monkeypatch.setattr(imagenet_archives.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(split, archives, tmp_path)
    assert not (tmp_path / split).exists()
    unpack(split, archives, tmp_path)
    files = TRAIN if split == "train" else VAL
    assert state(tmp_path / split) == files
    assert written[3:] == written[2:3] + written[4:]
    assert len(written) == len(files) + 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-10240])


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"n00000001 7", b"n00000001 8", 1))


@pytest.mark.parametrize(("damage", "reason"), [(cut, "bytes, and the official one"), (flip, "its MD5 sum is another")])
def test_a_damaged_archive_is_refused_and_leaves_nothing(archives, tmp_path, damage, reason):
    damage(archives / ARCHIVES["train"].file)
    with pytest.raises(ValueError, match=rf"img_train\.tar: not the official archive, or damaged \(.*{reason}"):
        unpack("train", archives, tmp_path / "root")
    assert os.listdir(tmp_path / "root") == []


@pytest.mark.parametrize("name", ["../n00000001.tar", "/n00000001.tar", "n00000001/../../a.tar", "notes.txt"])
def test_no_other_path_is_written(archives, register, tmp_path, name):
    register("train", write_tar(archives / ARCHIVES["train"].file, {name: b"bad"}), 6)
    with pytest.raises(ValueError, match=r"it holds .*, which is none of the files of ImageNet"):
        unpack("train", archives, tmp_path / "root")
    inner = tar_bytes(tmp_path, {name: b"bad"})
    register("train", write_tar(archives / ARCHIVES["train"].file, {"n00000001.tar": inner}), 6)
    with pytest.raises(ValueError, match=r"it holds .*, which is none of the files of ImageNet"):
        unpack("train", archives, tmp_path / "root")
    assert os.listdir(tmp_path / "root") == []


def test_links_are_not_followed(archives, register, tmp_path):
    with tarfile.open(archives / ARCHIVES["val"].file, "w") as tar:
        link = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "target")
        tar.addfile(link)
    register("val", archives / ARCHIVES["val"].file, 4)
    with pytest.raises(ValueError, match="it holds ILSVRC2012_val_00000001"):
        unpack("val", archives, tmp_path / "root")


def test_a_folder_that_is_not_complete_is_told(archives, tmp_path):
    unpack("train", archives, tmp_path)
    (tmp_path / "train" / "n00000001" / "n00000001_7.JPEG").unlink()
    with pytest.raises(ValueError, match=r"train: 5 files in 3 folders \(.*1, .*\); ImageNet has 6 in 3\. Remove"):
        unpack("train", archives, tmp_path)


def test_flat_validation_images_are_recognized_and_moved(archives, tmp_path, capsys):
    (tmp_path / "val").mkdir()
    for name, content in VAL.items():
        (tmp_path / "val" / name.split("/")[1]).write_bytes(content)
    assert len(find_flat(tmp_path / "val")) == 4
    with pytest.raises(ValueError, match=r"4 validation images .* without folders .*`knl prepare-imagenet` moves them"):
        ImageNetDataModule(tmp_path).setup("validate")
    (archives / ARCHIVES["val"].file).unlink()  # the devkit suffices
    unpack("val", archives, tmp_path)
    assert state(tmp_path / "val") == VAL
    assert "4 images moved" in capsys.readouterr().out
    with pytest.raises(ValueError, match="ImageNet has 1000 folders"):
        ImageNetDataModule(tmp_path).setup("validate")


def test_missing_archives_are_named(archives, tmp_path):
    (archives / ARCHIVES["train"].file).unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*img_train\.tar"):
        unpack("train", archives, tmp_path)
    (archives / ARCHIVES["devkit"].file).unlink()
    with pytest.raises(FileNotFoundError, match="devkit"):
        unpack("val", archives, tmp_path)
    for root in (archives, tmp_path):  # without folders, and with others than those of classes
        with pytest.raises((FileNotFoundError, ValueError), match="prepare-imagenet"):
            ImageNetDataModule(root).setup("fit")
