import hashlib
import inspect

import pytest

from knlightning.internals.torchvision import CIFAR10, CIFAR100, IMG_EXTENSIONS, check_integrity, download_url

CHANGED = "torchvision has changed: correct knlightning/internals/torchvision.py and "


@pytest.mark.parametrize(
    ("dataset", "folder", "train", "test", "meta", "checksum"),
    [
        (CIFAR10, "cifar-10-batches-py", 5, ["test_batch"], "batches.meta", "c58f30108f718f92721af3b95e74349a"),
        (CIFAR100, "cifar-100-python", 1, ["test"], "meta", "eb9058c3a382ffc7106e4002c42a8d85"),
    ],
)
def test_cifar_says_where_its_files_are(dataset, folder, train, test, meta, checksum):
    advice = CHANGED + "knlightning/data/cifar.py, or write the names of the files there"
    try:
        found = (dataset.base_folder, len(dataset.train_list), [name for name, _ in dataset.test_list])
        found = (*found, dataset.meta["filename"], dataset.tgz_md5)
        assert dataset.url.endswith(dataset.filename), advice
        assert dataset.meta["key"] in ("label_names", "fine_label_names"), advice
    except AttributeError as error:
        pytest.fail(f"{error}. {advice}")
    assert found == (folder, train, test, meta, checksum), advice


def test_suffixes_of_images_are_lower_case_with_a_dot():
    advice = CHANGED + "find_images in knlightning/data/folder.py"
    assert isinstance(IMG_EXTENSIONS, tuple), advice  # as str.endswith takes it
    assert {".jpg", ".jpeg", ".png"} <= {*IMG_EXTENSIONS}, advice
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMG_EXTENSIONS), advice


def test_archives_are_downloaded_with_a_checksum(tmp_path):
    advice = CHANGED + "CIFAR10DataModule.prepare_data"
    assert {"url", "root", "filename", "md5"} <= {*inspect.signature(download_url).parameters}, advice
    path = tmp_path / "file"
    assert not check_integrity(path, "0" * 32), advice
    path.write_bytes(b"content")
    assert check_integrity(path, hashlib.md5(b"content").hexdigest()), advice
    assert not check_integrity(path, "0" * 32), advice


@pytest.mark.parametrize("dataset", [CIFAR10, CIFAR100])
def test_files_of_cifar_have_checksums(dataset):
    sums = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
    assert all(len(md5) == 32 for _, md5 in sums), CHANGED + "CIFAR10DataModule._differing"
