import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import standins
import torch
from standins import RandomData, TinyNet

from knlightning.callbacks import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from knlightning.tasks import ClassificationTask


def fit(root, *callbacks, ckpt_path=None, task=None, **kwargs):
    run = standins.trainer(root, *callbacks, plugins=[AtomicCheckpointIO()], **kwargs, enable_checkpointing=True)
    run.fit(task or ClassificationTask(TinyNet(3)), RandomData(), ckpt_path=ckpt_path)
    return run


class Scripted(ClassificationTask):
    """Reports the scores that it is told to."""

    def __init__(self, *scores):
        super().__init__(TinyNet(3))
        self.scores = scores

    def on_validation_epoch_end(self):
        self.log("score", self.scores[self.current_epoch])


def stored(path):
    return torch.load(path, weights_only=True)


def test_last_is_written_at_the_end_of_every_epoch(tmp_path):
    fit(tmp_path, LastCheckpoint(), max_epochs=2)
    checkpoint = stored(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 6
    assert os.listdir(tmp_path / "checkpoints") == ["last.ckpt"]


@pytest.mark.parametrize(("accumulate", "steps"), [(1, [2, 3, 4, 6]), (2, [1, 2, 3, 4])])
def test_last_is_written_after_whole_steps_within_an_epoch(tmp_path, accumulate, steps):
    seen = []

    class Spy(LastCheckpoint):
        def _save(self, trainer):
            seen.append(trainer.global_step)

    spy = Spy(every_n_steps=2 if accumulate == 1 else 1)
    fit(tmp_path, spy, max_epochs=2, accumulate_grad_batches=accumulate)  # 3 batches an epoch
    assert seen == steps


@pytest.mark.parametrize(("mode", "scores", "epoch"), [("max", (1.0, 3.0, 2.0), 1), ("min", (2.0, 1.0, 3.0), 1)])
def test_best_is_that_of_the_best_score(tmp_path, mode, scores, epoch):
    best = BestCheckpoint("score", mode)
    fit(tmp_path, best, LastCheckpoint(), task=Scripted(*scores), max_epochs=3)
    assert stored(tmp_path / "checkpoints" / "best.ckpt")["epoch"] == epoch
    assert best.best_model_score == scores[1]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("third", "epoch"), [(2.0, 1), (4.0, 2)])
def test_best_score_survives_a_resume_also_of_a_moved_run(tmp_path, moved, third, epoch):
    root = tmp_path / "a"
    fit(root, BestCheckpoint("score"), LastCheckpoint(), task=Scripted(1.0, 3.0), max_epochs=2)
    if moved:
        root = shutil.move(root, tmp_path / "b")
    fit(
        root,
        BestCheckpoint("score"),
        LastCheckpoint(),
        task=Scripted(0.0, 0.0, third),
        max_epochs=3,
        ckpt_path=root / "checkpoints" / "last.ckpt",
    )
    assert stored(root / "checkpoints" / "best.ckpt")["epoch"] == epoch


@pytest.mark.parametrize(
    ("few", "never"),
    [
        ({"max_steps": 2}, True),
        ({"max_steps": 3}, False),
        ({"max_steps": 1, "accumulate_grad_batches": 2}, True),
        ({"max_steps": 5, "check_val_every_n_epoch": 2}, True),
        ({"max_steps": 1, "val_check_interval": 1}, False),
    ],
)
def test_a_run_that_ends_before_its_first_validation_says_so(tmp_path, few, never):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(tmp_path, BestCheckpoint("val/loss"), max_epochs=3, **few)
    assert any(f"max_steps={few['max_steps']} ends it before" in str(warning.message) for warning in said) == never
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file() != never


def test_best_starts_anew_where_its_file_is_not(tmp_path):
    fit(tmp_path / "a", BestCheckpoint("score"), LastCheckpoint(), task=Scripted(9.0), max_epochs=1)
    best = BestCheckpoint("score")
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "b", best, task=Scripted(0.0, 1.0), max_epochs=2, ckpt_path=last)
    assert best.best_model_score == 1.0
    assert (tmp_path / "b" / "checkpoints" / "best.ckpt").is_file()


def test_nothing_is_written_by_a_fast_dev_run(tmp_path):
    fit(tmp_path, BestCheckpoint(), LastCheckpoint(), fast_dev_run=True)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("steps", [0, -1])
def test_every_n_steps_out_of_range(steps):
    with pytest.raises(ValueError, match=r"every_n_steps.*at least 1"):
        LastCheckpoint(steps)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
    with pytest.raises(AttributeError):
        AtomicCheckpointIO().save_checkpoint({"a": lambda: None}, path)  # cannot be pickled
    assert stored(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))  # what more is written is an error
    try:
        with pytest.raises(OSError, match=r"cannot be written: File too large: '.*a\.ckpt'"):
            AtomicCheckpointIO().save_checkpoint({"a": torch.ones(10**6)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stored(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_damaged_checkpoint_is_not_loaded(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(100.0)}, path)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["a"], torch.arange(100.0))
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(100.0).numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.ckpt is damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_states_of_other_optimizers_are_refused(tmp_path):
    fit(tmp_path, LastCheckpoint(), max_epochs=1)
    path = tmp_path / "checkpoints" / "last.ckpt"
    torch.save(stored(path) | {"optimizer_states": []}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt holds the states of 0 optimizers, and this run has 1"):
        fit(tmp_path, LastCheckpoint(), max_epochs=2, ckpt_path=path)


@pytest.mark.slow
def test_file_is_whole_at_every_moment(tmp_path):
    code = (
        "import torch, sys; from knlightning.callbacks import AtomicCheckpointIO\n"
        "while True: AtomicCheckpointIO().save_checkpoint({'a': torch.ones(10**6)}, sys.argv[1])"
    )
    path = tmp_path / "a.ckpt"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.05)
    for _ in range(15):  # whoever looks meets a whole file, so a kill at that moment leaves one
        assert stored(path)["a"].sum() == 10**6
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert stored(path)["a"].sum() == 10**6
