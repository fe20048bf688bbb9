import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler
from torchvision.transforms.v2.functional import pil_to_tensor

from knlightning.data import ImageFiles
from knlightning.data.samplers import SeededSampler
from knlightning.privacy.loader import PrivateLoader
from knlightning.privacy.randomness import SecretRandom, known_key

SAMPLES = 60


def private(loader, first=0, **kwargs):
    settings = {"batch_size": 12, "steps_per_epoch": 5, "micro_batches": 3, "views": 1, "world_size": 1, "rank": 0}
    return PrivateLoader(loader, random=SecretRandom(known_key(0)), next_step=lambda: first, **(settings | kwargs))


def loader(dataset=None, sampler=None, num_workers=0, **kwargs):
    dataset = dataset or TensorDataset(torch.arange(SAMPLES), torch.rand(SAMPLES, 2))
    return private(DataLoader(dataset, 12, sampler=sampler, num_workers=num_workers), **kwargs)


def numbers(batches):
    return [batch[0].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_of_all_ranks_are_the_steps_samples(workers):
    batches = [numbers(loader(world_size=2, rank=rank, num_workers=workers)) for rank in range(2)]
    assert all(len(each) == len(loader()) == 15 for each in batches)
    for step in range(5):
        cells = [cell for each in batches for cell in each[3 * step : 3 * step + 3]]
        chosen = SecretRandom(known_key(0)).chosen(SAMPLES, 0.2, step)
        assert sorted(i for cell in cells for i in cell) == sorted(chosen.tolist())
        assert max(map(len, cells)) - min(map(len, cells)) <= 1


def test_empty_micro_batches_have_the_shape_of_others():
    batches = list(loader(batch_size=0))
    assert [(len(a), tuple(b.shape), b.dtype) for a, b in batches] == [(0, (0, 2), torch.float32)] * 15


def test_goes_on_where_it_was_with_the_steps_that_were_to_come():
    whole = numbers(loader())
    first = loader()
    iterator = iter(first)
    seen = [next(iterator)[0].tolist() for _ in range(6)]
    state = first.state_dict()
    assert state == {"num_steps": 2, "micro_batch": 0}
    second = loader(first=2)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert seen + numbers(second) == whole
    assert len(numbers(second)) == 15  # the next epoch is a whole one
    done = loader(first=5)
    done.load_state_dict({"num_steps": 5, "micro_batch": 0})
    assert len(numbers(done)) == 15


def test_a_resume_with_other_micro_batches():
    second = loader(first=2, micro_batches=2)
    second.load_state_dict({"num_steps": 2, "micro_batch": 0})
    assert len(numbers(second)) == 6


def test_reads_samples_by_their_numbers():
    numbers, _ = loader().batch_of([3, 1])
    assert numbers.tolist() == [3, 1]


def test_views_follow_one_another():
    for batch in numbers(loader(views=3)):
        assert batch[::3] == batch[1::3] == batch[2::3]


class Showings(Dataset):
    """A dataset that varies its samples itself, by the seed, step and view it is given."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, draw):
        return torch.tensor(draw)


def test_each_showing_has_random_numbers_of_its_own():
    sampler = SeededSampler(SAMPLES, seed=7)
    draws = [tuple(row) for batch in loader(Showings(), views=2, first=10, sampler=sampler) for row in batch.tolist()]
    assert len(set(draws)) == len(draws)
    ((seed, *_), *_) = draws
    assert {other for other, *_ in draws} == {seed}
    assert seed != 7  # a secret one
    assert {step for _, step, *_ in draws} == {10, 11, 12, 13, 14}
    assert {view for *_, view in draws} == {0, 1}


class Drawing(Dataset):
    """Draws from all global generators."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.tensor(index), torch.tensor([float(torch.rand(())), np.random.rand(), random.random()])


class DrawingAtOnce(Drawing):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Drawing, DrawingAtOnce])
def test_what_is_drawn_for_a_sample_does_not_depend_on_the_others(kind):
    one = loader(kind(), views=2)
    (_, with_others), (_, alone), (_, later) = one.batch_of([3, 7, 1]), one.batch_of([7]), one.batch_of([7], step=1)
    assert torch.equal(with_others[2:4], alone)
    assert len({*alone.flatten().tolist(), *later.flatten().tolist()}) == 12
    # the same in training
    number, drawn = next(batch for batch in one if len(batch[0]) > 2)
    step = next(s for s in range(5) if set(number.tolist()) <= set(one.draw(s).tolist()))
    assert torch.equal(drawn[-2:], one.batch_of([int(number[-1])], step)[1])


def test_shuffled_batches_of_equal_size():
    steps = numbers(loader(micro_batches=1, poisson_sampling=False))
    assert [len(step) for step in steps] == [12] * 5
    assert Counter(i for step in steps for i in step) == Counter(range(SAMPLES))  # each once in an epoch
    assert numbers(loader(micro_batches=1, poisson_sampling=False, first=5)) != steps


def test_steps_are_cut_at_a_largest_size():
    whole, cut = (numbers(loader(max_samples=most)) for most in (None, 9))
    steps = [[i for batch in batches[3 * s : 3 * s + 3] for i in batch] for batches in (whole, cut) for s in range(5)]
    assert max(map(len, steps[:5])) > 9
    assert [len(step) for step in steps[5:]] == [min(9, len(step)) for step in steps[:5]]
    assert all(set(few) <= set(all_of) for few, all_of in zip(steps[5:], steps[:5], strict=True))
    assert max(map(len, cut)) == 3


def test_what_cannot_be_taken_over():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    for given, message in (
        ([1, 2, 3], "needs a torch.utils.data.DataLoader .* got a list"),
        (DataLoader(Stream()), "with __getitem__ and __len__"),
        (DataLoader(range(4), batch_sampler=[[0, 1], [2, 3]]), "a batch_sampler in place of a batch_size"),
        (DataLoader(range(4), batch_size=None), "give it a batch_size"),
        (DataLoader(range(4), sampler=WeightedRandomSampler([1, 1], 2)), "a sampler of its own, WeightedRandomSampler"),
    ):
        with pytest.raises(ValueError, match=message):
            private(given)


class Damaged(Dataset):
    """Samples of which each third cannot be read, or in some views only."""

    def __init__(self, views=()):
        self.views, self.count = views, Counter()

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.count[index] += 1
        unreadable = index % 3 == 0 and (not self.views or self.count[index] % 2 in self.views)
        return None if unreadable else (torch.tensor(index), torch.rand(2))


@pytest.mark.parametrize("views", [(), (0,), (1,)])
def test_what_cannot_be_read_contributes_nothing_in_any_view(views):
    whole = numbers(loader(views=2))
    left = numbers(loader(Damaged(views), views=2))
    assert left == [[sample for sample in batch if sample % 3] for batch in whole]
    assert all(count in (0, 2) for batch in left for count in Counter(batch).values())


def test_a_batch_of_which_nothing_can_be_read_is_empty():
    data = Damaged()
    pieces = loader(data, views=1)._batches
    assert [part.shape for part in pieces["batch 0", 0, [3, 6]]] == [(0,), (0, 2)]


def test_no_image_takes_the_place_of_a_damaged_one(tmp_path):
    for number in range(6):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    for number in (2, 3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    names = [f"{number}.png" for number in range(6)]
    files = ImageFiles(tmp_path, names, torch.arange(6), torch.as_tensor, pil_to_tensor, skip_damaged=True)
    whole = DataLoader(files, 6, sampler=SeededSampler(6, 0), collate_fn=files.collate)
    with pytest.warns(UserWarning, match="2 of the 6 images could not be read"):
        batches = list(private(whole, batch_size=6, micro_batches=1))  # each step takes all of them
    assert [sorted(labels.tolist()) for _, labels in batches] == [[0, 1, 4, 5]] * 5
    assert [image.shape for image in private(whole, batch_size=6).batch_of([2, 3])] == [(0, 3, 8, 8), (0,)]
