"""Runs that are stopped and resumed, with a real Trainer."""

from itertools import chain
from types import SimpleNamespace

import pytest
import standins
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from standins import Interrupt

from knlightning.data import ImageDataModule, ResumableLoader, TrainSampler
from knlightning.data.loader import drops_last
from knlightning.data.samplers import Sampling

# a resumed run goes on in the folder of the first
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

SAMPLES, BATCH, EPOCHS = 44, 4, 3
BATCHES = SAMPLES // BATCH


class NumberedImages(ImageDataModule):
    """Images that carry their own number in every pixel."""

    class_names = ("even", "odd")
    mean, std, image_size = (0.5,), (0.5,), (1, 2)

    def read(self, train):
        numbers = torch.arange(SAMPLES if train else 10)
        return numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 1, 2).contiguous(), numbers % 2

    def _workers(self, dataset):
        return self.num_workers or 0  # as if the images were read from files


class Recorder(LightningModule):
    """Linear model without randomness that notes which images it was trained on."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.seen = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        numbers = tuple((images[:, 0, 0, 0] * 255).round().int().tolist())
        self.seen.append((self.current_epoch, batch_idx, numbers))
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def run(folder, workers=0, resume=None, stop_after=-1, batch_size=BATCH, **options):
    """Train, with a checkpoint after each step unless `save` says otherwise."""
    model = Recorder()
    save = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **options.pop("save", {"every_n_train_steps": 1}))
    trainer = standins.trainer(
        None,
        save,
        Interrupt(stop_after),
        num_sanity_val_steps=0,
        **{"max_epochs": EPOCHS, **options},
        enable_checkpointing=True,
    )
    data = NumberedImages(batch_size=batch_size, num_workers=workers)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    except SystemExit:
        assert stop_after >= 0
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    return run(tmp_path_factory.mktemp("whole"))


def assert_continues(resumed, whole, after):
    assert resumed.seen == whole.seen[after:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert torch.equal(resumed.layer.bias, whole.layer.bias)


def test_each_epoch_sees_all_images_in_an_order_of_its_own(whole):
    orders = []
    for epoch in range(EPOCHS):
        orders.append([number for at, _, numbers in whole.seen if at == epoch for number in numbers])
        assert sorted(orders[-1]) == list(range(SAMPLES))
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_as_if_it_had_not_been(tmp_path, whole, workers):
    stopped = run(tmp_path, workers, stop_after=BATCHES + 6, save={"every_n_train_steps": 4})
    assert stopped.seen == whole.seen[: BATCHES + 6]
    after = 16  # step 16 is the last with a checkpoint: in the middle of epoch 1, a few steps before the stop
    resumed = run(tmp_path, workers, resume=str(tmp_path / f"step={after}.ckpt"), save={"every_n_train_steps": 4})
    assert_continues(resumed, whole, after)


EVERY_STEP, AT_VALIDATION, AT_EPOCH_END = (
    {"every_n_train_steps": 1},
    {"every_n_epochs": 1},
    {"save_on_train_epoch_end": True},
)
BY_STEPS = {"max_epochs": -1, "max_steps": EPOCHS * BATCHES}


@pytest.mark.parametrize(
    ("save", "options", "after"),
    [
        (EVERY_STEP, {}, 1),
        (EVERY_STEP, {}, BATCHES),
        (EVERY_STEP, BY_STEPS, BATCHES),
        (EVERY_STEP, BY_STEPS, BATCHES + 3),
        (AT_VALIDATION, {}, BATCHES),
        (AT_VALIDATION, {"val_check_interval": 5}, BATCHES + 5),
        (AT_VALIDATION, BY_STEPS, BATCHES),
        (AT_EPOCH_END, {}, BATCHES),
        (AT_EPOCH_END, BY_STEPS, BATCHES),
    ],
)
def test_every_kind_of_checkpoint_continues_exactly(tmp_path, whole, save, options, after):
    run(tmp_path, stop_after=after + 1, save=save, **options)
    resumed = run(tmp_path, resume=str(tmp_path / f"step={after}.ckpt"), save=save, **options)
    assert_continues(resumed, whole, after)


def test_the_seed_comes_with_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    whole = run(tmp_path / "whole")
    for after in (BATCHES, BATCHES + 2):
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")
        run(tmp_path / f"{after}", stop_after=after + 1)
        monkeypatch.delenv("PL_GLOBAL_SEED")
        assert_continues(run(tmp_path / f"{after}", resume=str(tmp_path / f"{after}/step={after}.ckpt")), whole, after)


def test_epochs_cut_short_by_a_limit_continue_too(tmp_path):
    whole = run(tmp_path / "whole", limit_train_batches=6)
    run(tmp_path, limit_train_batches=6, stop_after=9)
    assert_continues(run(tmp_path, resume=str(tmp_path / "step=8.ckpt"), limit_train_batches=6), whole, 8)


def test_another_batch_size_in_the_middle_of_an_epoch_is_refused_and_after_it_is_not(tmp_path):
    run(tmp_path, stop_after=BATCHES + 1)
    with pytest.raises(ValueError, match=r"after 3 batches of epoch 0, with batch_size=4 \(now 11\)"):
        run(tmp_path, resume=str(tmp_path / "step=3.ckpt"), batch_size=11)
    resumed = run(tmp_path, resume=str(tmp_path / f"step={BATCHES}.ckpt"), batch_size=11)
    assert [len(numbers) for _, _, numbers in resumed.seen] == [11] * 4 * 2


# what overfit_batches is for
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_overfitting_on_a_few_batches_repeats_them(tmp_path):
    model = run(tmp_path, overfit_batches=2)
    assert [numbers for _, _, numbers in model.seen] == [(0, 1, 2, 3), (4, 5, 6, 7)] * EPOCHS


def loader(workers=0, **sampler):
    return ResumableLoader(
        list(range(10)),
        batch_size=3,
        sampler=TrainSampler(10, **{"seed": 0, **sampler}),
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def batches(loader):
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_position_counts_what_was_handed_out(workers):
    first = loader(workers)
    first.sampler.set_epoch(5)
    expected = batches(first)
    iterator = iter(first)
    assert [next(iterator).tolist() for _ in range(2)] == expected[:2]
    state = first.state_dict()
    assert (state["epoch"], state["batches"]) == (5, 2)

    second = loader(workers)
    second.load_state_dict(state)
    assert len(second) == 4
    assert second.state_dict() == state  # nothing read yet: still the same position
    assert batches(second) == expected[2:]
    assert batches(second) == expected  # only the first pass is cut short


def test_another_number_of_devices_goes_on_with_the_same_images_in_each_step(caplog):
    def loaders(ranks, batch_size):
        samplers = [TrainSampler(26, 7, ranks, rank) for rank in range(ranks)]
        return [
            ResumableLoader(range(26), batch_size, sampler=sampler, generator=torch.Generator()) for sampler in samplers
        ]

    def steps(loaders):
        return [sorted(chain(*parts)) for parts in zip(*map(batches, loaders), strict=True)]

    whole = steps(loaders(2, 4))
    assert steps(loaders(1, 8)) == whole
    begun = loaders(2, 4)[0]
    iterator = iter(begun)
    for _ in range(2):
        next(iterator)
    for ranks, batch_size in ((1, 8), (4, 2)):
        others = loaders(ranks, batch_size)
        for other in others:
            other.load_state_dict(begun.state_dict())
        with caplog.at_level("INFO"):
            assert steps(others)[:1] == whole[2:3]
        assert f"after 2 batches with batch_size=4 (now {batch_size}), ranks=2 (now {ranks})" in caplog.text
    (other,) = loaders(1, 4)
    other.load_state_dict(begun.state_dict())
    with pytest.raises(ValueError, match=r"with ranks=2 \(now 1\)\. Other batches"):
        batches(other)


def test_the_epoch_may_be_set_after_the_iterator_is_made():
    ours = loader(workers=2)
    iterator = iter(ours)
    ours.sampler.set_epoch(3)
    fresh = loader()
    fresh.sampler.set_epoch(3)
    assert [batch.tolist() for batch in iterator] == batches(fresh)


def test_persistent_workers_follow_the_epoch():
    many, alone = loader(workers=2), loader()
    for epoch in range(3):
        many.sampler.set_epoch(epoch)
        alone.sampler.set_epoch(epoch)
        assert batches(many) == batches(alone)


def test_position_of_a_finished_epoch_begins_the_next_at_its_start():
    ours = loader()
    batches(ours)
    ours.sampler.set_epoch(1)
    assert ours.state_dict()["batches"] == 0
    fresh = loader()
    fresh.load_state_dict(loader().state_dict() | {"epoch": 0, "batches": 4})
    fresh.sampler.set_epoch(1)
    assert batches(fresh) == batches(ours)


@pytest.mark.parametrize(
    "changed",
    [
        {"ranks": 2, "rank": 0},
        {"samples": 9},
        {"seed": 1},
        {"repeats": 2},
        {"strata": torch.zeros(10, dtype=torch.int64)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_ranks_images_seed_or_repeats_are_refused_too(changed):
    begun = loader()
    next(iter(begun))
    other = ResumableLoader(
        list(range(10)),
        batch_size=3,
        sampler=TrainSampler(**{"samples": 10, "seed": 0, **changed}),
    )
    other.load_state_dict(begun.state_dict())
    with pytest.raises(ValueError, match="balanced=0" if "strata" in changed else f"{next(iter(changed))}="):
        next(iter(other))


# a last batch that is not full


@pytest.mark.parametrize(
    ("samples", "batch_size", "norm", "dropped"),
    [(9, 4, True, True), (9, 4, False, False), (10, 4, True, False), (1, 4, True, False), (3, 1, True, False)],
)
def test_single_image_at_the_end_is_left_out_for_batch_normalization(samples, batch_size, norm, dropped):
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(1) if norm else torch.nn.GroupNorm(1, 1))
    trainer = SimpleNamespace(lightning_module=network)
    assert drops_last(None, Sampling(), samples, batch_size, trainer) == dropped
    assert not drops_last(None, Sampling(), samples, batch_size, None)
    assert drops_last(None, Sampling(drop_last=True), samples, batch_size, trainer)
    for asked in (True, False):
        assert drops_last(asked, Sampling(drop_last=not asked), samples, batch_size, trainer) == asked


@pytest.mark.parametrize(("drop_last", "batches"), [(None, 5), (True, 4)])
def test_datamodule_leaves_the_last_batch_out_if_asked(drop_last, batches):
    data = NumberedImages(batch_size=9, drop_last=drop_last)  # 44 images
    data.setup("fit")
    assert len(data.train_dataloader()) == batches
