import math

import pytest
from commands.runs import refused
from standins import tiny_config, write_config

from knlightning.checks import ArgumentError
from knlightning.commands.ranges import MOST_BATCHES, check_lightning_arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate_grad_batches", 0),
        ("accumulate_grad_batches", None),
        ("check_val_every_n_epoch", -1),
        ("fast_dev_run", -1),
        ("fast_dev_run", 2**62),
        ("gradient_clip_val", -1.0),
        ("gradient_clip_val", math.nan),
        ("gradient_clip_val", math.inf),
        ("limit_train_batches", -1),
        ("limit_train_batches", 1.5),
        ("limit_val_batches", 1e308),
        ("limit_test_batches", math.nan),
        ("limit_predict_batches", MOST_BATCHES + 1),
        ("log_every_n_steps", -1),
        ("max_epochs", -2),
        ("max_epochs", 2**63),
        ("max_steps", None),
        ("min_epochs", -1),
        ("num_sanity_val_steps", -4),
        ("overfit_batches", -0.5),
        ("val_check_interval", 0),
        ("val_check_interval", True),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(ArgumentError, match=f"^{name} must be "):
        check_lightning_arguments(0, {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate_grad_batches", 1),
        ("fast_dev_run", True),
        ("fast_dev_run", 3),
        ("gradient_clip_val", 0),
        ("gradient_clip_val", None),
        ("limit_train_batches", 0),
        ("limit_train_batches", 0.5),
        ("limit_val_batches", 10),
        ("limit_val_batches", 10.0),
        ("max_epochs", -1),
        ("max_epochs", None),
        ("max_steps", -1),
        ("num_sanity_val_steps", -1),
        ("val_check_interval", 0.25),
        ("val_check_interval", "00:15:00:00"),
        ("check_val_every_n_epoch", None),
        ("min_epochs", None),
    ],
)
def test_within_the_range(name, value):
    check_lightning_arguments(0, {name: value})


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_seeds(seed):
    with pytest.raises(ArgumentError, match=r"^seed_everything must be "):
        check_lightning_arguments(seed, {})


@pytest.mark.parametrize("seed", [True, False, None, 0, 2**32 - 1])
def test_good_seeds(seed):
    check_lightning_arguments(seed, {})


@pytest.mark.parametrize("key", ["trainer", "pictures", "best_checkpoint"])
@pytest.mark.parametrize("value", [None, 3, math.nan, [], "x"])
def test_groups_are_groups(empty, capsys, key, value):
    write_config(empty / "tiny.yaml", tiny_config() | {key: value})
    assert key in refused(capsys, "fit", "--config", "tiny.yaml")
    assert key in refused(capsys, "fit", "--config", "tiny.yaml", "--trainer.max_epochs=1", "--pictures.images=3")
    assert [path.name for path in empty.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val must be a number at least 0"),
        (["--trainer.limit_val_batches=2.5"], "trainer.limit_val_batches must be a share"),
        (["--seed_everything=-1"], "--seed_everything must be a whole number at least 0"),
    ],
)
def test_commands_name_the_key_before_anything_else(empty, capsys, args, said):
    assert said in refused(capsys, "fit", "--config", "tiny.yaml", *args)
    assert [path.name for path in empty.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("key", ["trainer.fast_dev_run", "data.batch_size"])
def test_whole_numbers_fit_into_64_bits(empty, capsys, key):
    message = refused(capsys, "fit", "--config", "tiny.yaml", f"--{key}={2**70}")
    assert "must be a number that fits into 64 bits, got 1180591620717411303424" in message
