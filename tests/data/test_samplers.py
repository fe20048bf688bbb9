from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knlightning.data import EvalSampler, TrainSampler
from knlightning.data.samplers import SeededIndex, SeededSampler

sizes = st.tuples(st.integers(1, 60), st.integers(1, 5)).filter(lambda size: size[0] >= size[1])


@given(sizes, st.integers(0, 2**32 - 1), st.integers(0, 500))
def test_training_parts_are_disjoint_and_equally_long(size, seed, epoch):
    samples, ranks = size
    parts = []
    for rank in range(ranks):
        sampler = TrainSampler(samples, seed, ranks, rank)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == samples // ranks
    seen = list(chain(*parts))
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(samples))


def test_ranks_share_the_batches_one_process_would_see():
    alone = list(TrainSampler(24, seed=3))
    pair = [list(TrainSampler(24, seed=3, ranks=2, rank=rank)) for rank in range(2)]
    for batch in range(3):
        assert set(alone[8 * batch : 8 * batch + 8]) == {i for part in pair for i in part[4 * batch : 4 * batch + 4]}


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    def order(seed, epoch):
        sampler = TrainSampler(100, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    different = {tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(different) == 16


def test_every_image_is_left_out_now_and_then():
    left_out = set()
    for epoch in range(60):
        seen = set()
        for rank in range(2):
            sampler = TrainSampler(7, 0, 2, rank)
            sampler.set_epoch(epoch)
            seen |= set(sampler)
        left_out |= set(range(7)) - seen
    assert left_out == set(range(7))


def test_start_skips_images_but_not_length():
    sampler = TrainSampler(20, seed=0, ranks=2, rank=1)
    whole = list(sampler)
    sampler.start = 4
    assert list(sampler) == whole[4:]
    assert len(sampler) == 10


def test_fewer_images_than_ranks_is_an_error():
    with pytest.raises(ValueError, match=r"^samples must be a whole number at least 4, got 3\. Each process"):
        TrainSampler(3, 0, 4, 0)


@given(st.integers(0, 60), st.integers(1, 5))
def test_evaluation_sees_every_image_exactly_once(samples, ranks):
    samplers = [EvalSampler(samples, ranks, rank) for rank in range(ranks)]
    assert sorted(chain(*samplers)) == list(range(samples))
    assert sum(map(len, samplers)) == samples


def distributed_by_torchvisions_references(order, ranks, rank, repetitions):
    """What `RASampler` of torchvision's references makes of a permutation, with an epoch of all images."""
    repeated = [image for image in order for _ in range(repetitions)]
    return repeated[rank::ranks][: len(order) // ranks]


@given(sizes, st.integers(1, 6))
def test_repeated_augmentation_is_that_of_torchvisions_references(size, repeats):
    samples, ranks = size
    order = list(TrainSampler(samples, seed=5))
    parts = [list(TrainSampler(samples, 5, ranks, rank, repeats=repeats)) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert part == distributed_by_torchvisions_references(order, ranks, rank, repeats)
        assert len(part) == len(TrainSampler(samples, 5, ranks, rank, repeats=repeats)) == samples // ranks


def test_repetitions_go_to_different_ranks_and_are_numbered():
    samplers = [SeededSampler(40, 7, 4, rank, repeats=4) for rank in range(4)]
    for sampler in samplers:
        sampler.set_epoch(3)
    for draws in zip(*samplers, strict=True):
        image = draws[0].image
        assert draws == tuple(SeededIndex(7, 3, image, repetition) for repetition in range(4))


def test_seeded_indices_are_those_of_the_images_also_when_resumed():
    plain, drawn = TrainSampler(20, 1, 2, 1, repeats=3), SeededSampler(20, 1, 2, 1, repeats=3)
    plain.start = drawn.start = 4
    assert [draw.image for draw in drawn] == list(plain)
    drawn.start = 0
    assert [draw.repetition for draw in drawn] == [place % 3 for place in range(1, 20, 2)]


def test_balanced_sampling_draws_each_class_equally_often():
    labels = torch.tensor([0] * 950 + [1] * 40 + [2] * 10)
    sampler = TrainSampler(1000, seed=0, strata=labels)
    drawn = labels[list(sampler)].bincount()
    assert drawn.sum() == 1000
    assert ((drawn - 1000 / 3).abs() < 60).all()  # four standard deviations
    pair = [list(TrainSampler(1000, 0, 2, rank, strata=labels)) for rank in range(2)]
    assert [i for both in zip(*pair, strict=True) for i in both] == list(sampler)
