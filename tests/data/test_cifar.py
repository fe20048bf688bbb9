import hashlib
import io
import os
import pickle
import struct
import tarfile
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from standins import Malicious
from torchvision import datasets

from knlightning.data import CIFAR10DataModule, CIFAR100DataModule

MODULES = [CIFAR10DataModule, CIFAR100DataModule]


def python2_pickle(value):
    """Pickle as Python 2 with numpy 1 did when the published files were made (protocol 2, byte strings)."""

    def write(value):
        match value:
            case int():
                return b"J" + struct.pack("<i", value)
            case str() | bytes():
                text = value.encode() if isinstance(value, str) else value
                return b"T" + struct.pack("<i", len(text)) + text
            case list():
                return b"](" + b"".join(map(write, value)) + b"e"
            case dict():
                return b"}(" + b"".join(write(key) + write(item) for key, item in value.items()) + b"u"
            case np.ndarray():
                head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
                dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN" + (write(-1) * 2) + b"K\x00tb"
                shape = b"(" + b"".join(map(write, value.shape)) + b"t"
                return head + b"(K\x01" + shape + dtype + b"\x89" + write(value.tobytes()) + b"tb"
        raise TypeError(type(value))

    return b"\x80\x02" + write(value) + b"."


def python3_pickle(value):
    return pickle.dumps(value, protocol=2)


class Tiny:
    """A dataset in the real format, with few images."""

    def __init__(self, root, module, dump=python2_pickle):
        self.module, self.dump, self.root = module, dump, root
        self.folder = root / module.source.base_folder
        self.folder.mkdir()
        self.labels = "labels" if module is CIFAR10DataModule else "fine_labels"
        generator = np.random.default_rng(0)
        self.content = {}
        for name, _ in module.source.train_list + module.source.test_list:
            images = generator.integers(0, 256, (20, 3072), np.uint8)
            labels = generator.integers(0, len(module.class_names), 20).tolist()
            files = [f"image_{number}.png" for number in range(20)]
            self.content[name] = {"batch_label": name, self.labels: labels, "data": images, "filenames": files}
            if module is CIFAR100DataModule:
                self.content[name]["coarse_labels"] = [label // 5 for label in labels]
        meta = {module.source.meta["key"]: [f"name {number}" for number in range(len(module.class_names))]}
        self.content[module.source.meta["filename"]] = meta
        for name in self.content:
            self.write(name)

    def write(self, name, **changes):
        (self.folder / name).write_bytes(self.dump(self.content[name] | changes))
        return self.folder / name

    def data(self, **arguments):
        return self.module(root=self.root, **arguments)

    @property
    def train(self):
        return self.module.source.train_list[0][0]


@pytest.fixture(params=MODULES)
def tiny(request, tmp_path):
    return Tiny(tmp_path, request.param)


def test_the_stand_in_for_python_2_writes_what_it_is_given():
    value = {"a": [1, -2, "x"], "data": np.arange(6, dtype=np.uint8).reshape(2, 3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy 2 reads what numpy 1 wrote, and remarks on its age
        read = pickle.loads(python2_pickle(value), encoding="latin1")
    assert read["a"] == value["a"]
    np.testing.assert_array_equal(read["data"], value["data"])


@pytest.mark.parametrize("dump", [python2_pickle, python3_pickle])
@pytest.mark.parametrize("module", MODULES)
def test_reads_every_image_label_and_name(tmp_path, module, dump):
    tiny = Tiny(tmp_path, module, dump)
    data = tiny.data()
    for train, files in ((True, module.source.train_list), (False, module.source.test_list)):
        images, labels = data.read(train)
        expected = np.concatenate([tiny.content[name]["data"] for name, _ in files])
        assert images.dtype == torch.uint8
        np.testing.assert_array_equal(images.numpy(), expected.reshape(-1, 3, 32, 32))  # red, green, blue planes
        assert labels.dtype == torch.int64
        assert labels.tolist() == [label for name, _ in files for label in tiny.content[name][tiny.labels]]
    assert data.class_names[1] == "name 1"
    assert data.num_classes == len(module.class_names)
    assert type(images) is torch.Tensor


@pytest.mark.parametrize(("module", "count"), [(CIFAR10DataModule, 10), (CIFAR100DataModule, 100)])
def test_names_are_known_before_the_data_are_there(module, count):
    names = module().class_names
    assert module().num_classes == len(set(names)) == count
    assert list(names) == sorted(names)  # both datasets number their classes in alphabetical order


def test_augmentation_crops_by_four_and_mirrors(tmp_path):
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[..., 16, 10] = 255
    varied = CIFAR10DataModule().augmentation(image.expand(3000, -1, -1, -1))
    places = {tuple(place) for place in varied[:, 0].nonzero()[:, 1:].tolist()}
    columns = {*range(6, 15), *range(17, 26)}  # 10 shifted by up to 4, and its mirror image 21
    assert places == {(row, column) for row in range(12, 21) for column in columns}


def test_missing_files_are_named_with_a_way_to_get_them(tiny):
    (tiny.folder / tiny.train).unlink()
    with pytest.raises(FileNotFoundError) as error:
        tiny.data().setup("fit")
    assert str(error.value).startswith(f"{tiny.train} missing in {tiny.folder}. ")
    for needed in ("Set download to true", tiny.module.source.url, "set root to"):
        assert needed in str(error.value)


def test_a_wrong_root_names_all_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^train, test, meta missing in .*nowhere/cifar-100-python"):
        CIFAR100DataModule(root=tmp_path / "nowhere").setup("test")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (np.zeros((20, 3071), np.uint8), r"uint8 of shape \(20, 3071\)"),
        (np.zeros((20, 3, 32, 32), np.uint8), r"uint8 of shape \(20, 3, 32, 32\)"),
        ([1, 2], "list"),
    ],
)
def test_wrong_images_are_named(tiny, data, found):
    path = tiny.write(tiny.train, data=data)
    with pytest.raises(ValueError, match=rf"{path}: 'data' must be uint8 of shape \(N, 3072\), found {found}"):
        tiny.data().setup("fit")


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([0] * 19, "must be a list of 20 labels, found 19 of them"),
        ({}, "must be a list of 20 labels, found dict"),
        ([0] * 19 + [100], "from 0 to 9+, found 100"),
        ([-1] + [0] * 19, "from 0 to 9+, found -1"),
        (["0"] * 20, "from 0 to 9+, found '0'"),
    ],
)
def test_wrong_labels_are_named(tiny, labels, found):
    path = tiny.write(tiny.train, **{tiny.labels: labels})
    with pytest.raises(ValueError, match=f"{path}: .*{found}"):
        tiny.data().setup("fit")


def test_another_content_is_named(tiny):
    path = tiny.folder / tiny.train
    path.write_bytes(python2_pickle({"pictures": []}))
    with pytest.raises(ValueError, match=f"{path}: a dict with the key 'data' is needed, found the keys pictures"):
        tiny.data().setup("fit")
    path.write_bytes(python2_pickle([1]))
    with pytest.raises(ValueError, match=f"{path}: a dict with the key 'data' is needed, found list"):
        tiny.data().setup("fit")
    tiny.write(tiny.train)
    meta = tiny.write(tiny.module.source.meta["filename"], **{tiny.module.source.meta["key"]: ["cat"]})
    with pytest.raises(ValueError, match=rf"{meta}: a list of \d+ names of classes is needed, found \['cat'\]"):
        tiny.data().setup("fit")


def test_a_malicious_file_is_named_and_not_run(tiny, tmp_path):
    trace = tmp_path / "was_run"
    path = tiny.folder / tiny.train
    path.write_bytes(pickle.dumps({"data": Malicious(os.mkdir, str(trace))}, protocol=2))
    with pytest.raises(ValueError, match=rf"{path}: .*posix\.mkdir is not allowed"):
        tiny.data().setup("fit")
    assert not trace.exists()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """CIFAR-100 packed as it is published, on a server of this machine."""
    folder = tmp_path / "server"
    folder.mkdir()
    source = CIFAR100DataModule.source
    path = folder / source.filename
    with tarfile.open(path, "w:gz") as tar:
        tar.add(Tiny(folder, CIFAR100DataModule).folder, source.base_folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(source, "url", f"http://127.0.0.1:{server.server_port}/{path.name}")
        monkeypatch.setattr(source, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield path
        server.shutdown()


def test_download_only_if_asked_for_and_needed(published, tmp_path):
    root = tmp_path / "home" / "data"
    CIFAR100DataModule(root).prepare_data()
    assert not root.exists()
    data = CIFAR100DataModule(root, download=True)
    data.prepare_data()
    data.setup("test")
    assert len(data.test_dataloader().dataset) == 20
    published.unlink()
    data.prepare_data()  # all there: nothing is asked of the server


def test_damaged_files_are_downloaded_again(published, tmp_path, monkeypatch):
    data = CIFAR100DataModule(tmp_path / "home", download=True)
    data.prepare_data()
    for part in ("train_list", "test_list"):  # as if these were the published files
        names = [name for name, _ in getattr(data.source, part)]
        sums = [[name, hashlib.md5((data.folder / name).read_bytes()).hexdigest()] for name in names]
        monkeypatch.setattr(data.source, part, sums)
    meta = hashlib.md5((data.folder / "meta").read_bytes()).hexdigest()
    monkeypatch.setattr(data.source, "meta", data.source.meta | {"md5": meta})
    whole = (data.folder / "train").read_bytes()
    (data.folder / "train").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "home" / published.name).unlink()
    CIFAR100DataModule(tmp_path / "home").prepare_data()  # not asked to
    assert (data.folder / "train").read_bytes() != whole
    data.prepare_data()
    assert (data.folder / "train").read_bytes() == whole


def test_an_archive_writes_into_its_folder_alone(published, tmp_path, monkeypatch):
    with tarfile.open(published, "w:gz") as tar:
        member = tarfile.TarInfo("../outside")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    monkeypatch.setattr(CIFAR100DataModule.source, "tgz_md5", hashlib.md5(published.read_bytes()).hexdigest())
    with pytest.raises(OSError, match="could not be downloaded"):
        CIFAR100DataModule(tmp_path / "home", download=True).prepare_data()
    assert not (tmp_path / "outside").exists()


def test_a_download_that_fails_says_what_to_do(published, tmp_path, monkeypatch):
    data = CIFAR100DataModule(tmp_path / "home", download=True)
    with monkeypatch.context() as wrong:
        wrong.setattr(datasets.CIFAR100, "tgz_md5", "0" * 32)
        with pytest.raises(OSError, match="Get it in another way and unpack it there"):
            data.prepare_data()
    published.unlink()
    (tmp_path / "home" / published.name).unlink()
    with pytest.raises(OSError, match=f"{published.name} could not be downloaded to {tmp_path / 'home'}"):
        data.prepare_data()
