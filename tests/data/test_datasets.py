import os
from pathlib import Path

import numpy as np
import pytest
import torch
from standins import mapping
from torch.utils.data import DataLoader

from knlightning.data.datasets import AugmentedImages, TensorImages
from knlightning.data.samplers import SeededIndex, SeededSampler, TrainSampler


class Noise(AugmentedImages):
    """Images of random numbers when training, of their index otherwise."""

    strata = torch.zeros(5, dtype=torch.int64)

    def take(self, indices):
        raise NotImplementedError

    def evaluation_sample(self, index):
        return torch.full((1, 2, 2), index), 0

    def training_sample(self, index):
        return torch.rand(1, 2, 2), index


def test_random_numbers_of_training_are_a_function_of_the_index_alone():
    indices = [SeededIndex(s, e, i, r) for s in range(2) for e in range(2) for i in range(2) for r in range(2)]
    before = torch.get_rng_state()
    first = [Noise()[index] for index in indices]
    assert torch.equal(torch.get_rng_state(), before)
    assert [label for _, label in first] == [index.image for index in indices]
    assert len({image.numpy().tobytes() for image, _ in first}) == 16
    torch.manual_seed(5)
    for index, (image, _) in zip(reversed(indices), reversed(first), strict=True):
        assert torch.equal(Noise()[index][0], image)
    assert torch.equal(Noise()[3][0], torch.full((1, 2, 2), 3))


def test_the_dataset_says_how_training_asks_for_its_images():
    assert Noise().train_sampler is SeededSampler
    assert TensorImages(torch.zeros(1, 3, 2, 2), torch.zeros(1)).train_sampler is TrainSampler


def test_batches_are_made_of_samples():
    images, labels = Noise.collate([Noise()[index] for index in (4, 2)])
    assert torch.equal(images[:, 0, 0, 0], torch.tensor([4, 2]))
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize("labels", [torch.arange(6), torch.arange(24, dtype=torch.uint8).view(6, 2, 2)])
def test_a_subset_of_a_subset_shares_the_images(labels):
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    whole = TensorImages(images, labels)
    subset = whole.take(torch.tensor([5, 3, 1])).take(torch.tensor([2, 0]))
    assert (len(whole), len(subset)) == (6, 2)
    assert subset.images.data_ptr() == images.data_ptr()
    assert torch.equal(subset.__getitems__([0, 1])[0], images[[1, 5]])
    assert torch.equal(subset.__getitems__([1, 0])[1], labels[[5, 1]])
    assert torch.equal(subset[1][0], images[5])
    assert torch.equal(subset[1][1], labels[5])
    assert subset.strata.tolist() == ([1, 5] if labels.ndim == 1 else [0, 0])


class MemoryOfWorkers(TensorImages):
    """Tells, instead of labels, how many bytes of the images its process holds for itself, and which process it is."""

    def __getitems__(self, indices):
        images, _ = super().__getitems__(indices)
        return images, torch.tensor([mapping(self.images.data_ptr())[1], os.getpid()])


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="asks Linux how memory is shared")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_do_not_copy_the_images(start, tmp_path):
    # ordinary memory, but for the file under it: Linux would tell of other memory together with it where they adjoin
    memory = np.memmap(tmp_path / "images", np.uint8, "w+", shape=(4000, 3, 32, 32))
    memory = np.memmap(tmp_path / "images", np.uint8, "c", shape=memory.shape)
    images = torch.from_numpy(memory).random_(0, 256)
    assert mapping(images.data_ptr())[1] >= images.nbytes  # what the measure says of a process that has them alone
    dataset = MemoryOfWorkers(images, torch.zeros(4000, dtype=torch.int64)).take(torch.arange(4000))
    loader = DataLoader(dataset, 500, num_workers=2, multiprocessing_context=start, collate_fn=dataset.collate)
    read, told = zip(*loader, strict=True)
    assert torch.equal(torch.cat(read), images)
    private, processes = zip(*(row.tolist() for row in told), strict=True)
    assert private == (0,) * 8
    assert len({*processes} - {os.getpid()}) == 2
