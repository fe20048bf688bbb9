import inspect

import pytest

from knlightning.internals.torchvision import CIFAR10, CIFAR100, IMG_EXTENSIONS, download_and_extract_archive

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


def test_archives_are_downloaded_with_a_checksum():
    advice = CHANGED + "CIFAR10DataModule.prepare_data"
    assert {"url", "download_root", "filename", "md5"} <= {
        *inspect.signature(download_and_extract_archive).parameters
    }, advice
