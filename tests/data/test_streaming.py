import pickle
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from standins import encoded

from knlightning.data import StreamingDataModule
from knlightning.data.datasets import TensorImages
from knlightning.data.samplers import SeededIndex
from knlightning.data.shard_writing import write_shards
from knlightning.data.streaming import AHEAD, ShardSampler, shard_order

SHARDS = torch.arange(12).repeat_interleave(torch.tensor([5, 7] * 6))


def order(seed=0, epoch=0, mixed_shards=3, shards=SHARDS, **arguments):
    sampler = ShardSampler(len(shards), seed, shards=shards, mixed_shards=mixed_shards, **arguments)
    sampler.set_epoch(epoch)
    return [index.image for index in sampler]


def test_an_epoch_shows_each_image_once_and_has_few_shards_in_use():
    for epoch in range(20):
        images = order(epoch=epoch)
        assert sorted(images) == list(range(72))
        places = shard_order(0, epoch, 12).argsort()[SHARDS[torch.tensor(images)]].tolist()
        for number, place in enumerate(places):
            # all that comes later is of shards that are in use, or of new ones
            assert min(places[number:]) > place - 3
            assert max(places[: number + 1]) < place + 3


def test_the_order_is_a_function_of_seed_and_epoch_and_mixes():
    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    # with as many shards mixed as there are, it is the order of all other datasets
    assert order(mixed_shards=12) == torch.randperm(72, generator=_generator()).tolist()
    positions = np.array([np.argsort(order(epoch=epoch)) for epoch in range(300)])
    assert abs(positions.mean(0) - 35.5).max() < 6  # no image comes early or late on average: 5 standard deviations


def _generator():
    seed = int(np.random.SeedSequence([0, 0]).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


def test_balanced_sampling_goes_from_shard_to_shard_too():
    strata = (torch.arange(7200) % 10 == 0).long()
    shards = torch.arange(7200) // 600
    sampler = ShardSampler(7200, 0, 1, 0, None, 1, strata, shards=shards, mixed_shards=3)
    images = torch.tensor([index.image for index in sampler])
    assert abs(strata[images].float().mean() - 0.5) < 0.03
    places = shard_order(0, 0, 12).argsort()[shards[images]]
    assert (places.cummax(0).values - places).max() < 3


@pytest.fixture
def pixels():
    return torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def root(tmp_path, pixels):
    """Forty training images in eight files, and ten of them again in two for validation."""
    labels = torch.arange(40) % 4
    write_shards(TensorImages(pixels, labels), "train", str(tmp_path / "root"), tuple("abcd"), 5)
    write_shards(TensorImages(pixels[:10], labels[:10]), "validation", str(tmp_path / "root"), tuple("abcd"), 5, False)
    return tmp_path / "root"


def module(root, **arguments):
    small = {"train_size": 8, "eval_resize": 8, "eval_size": 8, "batch_size": 4, "num_workers": 0, "mixed_shards": 2}
    return StreamingDataModule(str(root), cache_dir=f"{root}-cache", **{**small, **arguments})


def fitted(root, **arguments):
    data = module(root, **arguments)
    data.setup("fit")
    return data


def test_images_classes_and_names_are_those_that_were_written(root, pixels):
    data = module(root, augment=False)
    assert data.find_class_names() == tuple("abcd")
    data.setup("fit")
    assert data.class_names == tuple("abcd")
    images, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert torch.equal(images, pixels[:10])
    assert labels.tolist() == [number % 4 for number in range(10)]
    images, labels = (torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True))
    found = [[torch.equal(image, other) for other in pixels].index(True) for image in images]
    assert sorted(found) == list(range(40))
    assert labels.tolist() == [number % 4 for number in found]
    dataset = pickle.loads(pickle.dumps(data.val_dataloader().dataset))  # as a process that reads gets it
    assert dataset.path_of(7) == f"{root}/validation-00001-of-00002.parquet/2"
    data.setup("test")
    assert data.test_dataloader().dataset.path_of(7) == dataset.path_of(7)


def test_an_epoch_goes_on_in_its_middle_with_the_same_images(root):
    whole = list(fitted(root).train_dataloader())
    loader = fitted(root).train_dataloader()
    batches = iter(loader)
    begun = [next(batches) for _ in range(3)]
    state = loader.state_dict()
    loader = fitted(root).train_dataloader()
    loader.load_state_dict(state)
    for (images, labels), (others, their_labels) in zip([*begun, *loader], whole, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, their_labels)
    other = fitted(root, mixed_shards=3).train_dataloader()
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"with mixed_shards=2 \(now 3\)\. .*Resume with the same values"):
        next(iter(other))


@pytest.mark.slow
def test_processes_change_nothing(root):
    alone, shared = (list(fitted(root, num_workers=workers).train_dataloader()) for workers in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        assert all(map(torch.equal, one, other))


def test_the_files_that_follow_are_copied_ahead(root):
    dataset = fitted(root).train_dataloader().dataset
    following = shard_order(5, 1, 8).tolist()
    first = int(dataset.images.ends[following[0]]) - 1
    dataset[SeededIndex(5, 1, first, 0)]
    expected = {dataset.images.copies._path(dataset.images.shards[number]) for number in following[: 1 + AHEAD]}
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in expected) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(dataset.images.copies.folder.glob("*.arrow")) == expected


def test_held_out_images_keep_their_labels(root, pixels):
    data = fitted(root, val_split=0.2, augment=False)
    assert len(data.train_dataloader().dataset) == 32
    for images, labels in (*data.val_dataloader(), *data.train_dataloader()):
        for image, label in zip(images, labels, strict=True):
            assert [torch.equal(image, other) for other in pixels].index(True) % 4 == label


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixed_shards": 0}, "^mixed_shards must be a whole number at least 1, got 0"),
        ({"cache_gigabytes": 0}, "^cache_gigabytes must be a number above 0"),
        ({"cache_gigabytes": 1e-6}, r"^cache_gigabytes must be at least .*, the size of the 5 files in use at a time"),
        ({"val_name": "val"}, r"There are no files val-\*\.parquet"),
        ({"image_column": "picture"}, "^image_column must be one of the columns"),
    ],
)
def test_wrong_arguments_are_named(root, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        fitted(root, **arguments)


def test_images_that_are_sorted_by_class_are_told(tmp_path, pixels):
    data = TensorImages(pixels, torch.arange(40) // 10)
    for folder, shuffle in (("sorted", False), ("mixed", True)):
        for split in ("train", "validation"):
            write_shards(data, split, str(tmp_path / folder), (), 5, shuffle)
    with pytest.warns(UserWarning, match=r"images of 1\.0 classes on average, of 4: .* Set mixed_shards higher"):
        fitted(tmp_path / "sorted")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(tmp_path / "mixed")
        data = fitted(tmp_path / "sorted", mixed_shards=8)
    assert data.class_names == ("0", "1", "2", "3")


def test_a_row_that_is_no_image_is_named_or_skipped(tmp_path):
    content = encoded(Image.new("RGB", (8, 8)))

    class Files(list):
        def encoded(self, index):
            return content if index else b"\x80\x04cos\nsystem\n"  # a pickle is data like any other

    images = Files([(None, 0)] * 4)
    for split in ("train", "validation"):
        write_shards(images, split, str(tmp_path / "root"), ("a",), 2, shuffle=False)
    with pytest.raises(ValueError, match=r"train-00000-of-00002\.parquet/0: cannot be read as an image"):
        list(fitted(tmp_path / "root").train_dataloader())
    with pytest.warns(UserWarning, match=r"1 of the 4 images could not be read so far"):
        batches = list(fitted(tmp_path / "root", skip_damaged=True).train_dataloader())
    assert [len(labels) for _, labels in batches] == [4]
