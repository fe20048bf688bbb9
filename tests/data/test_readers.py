"""Processes that read files for a loader: what they say, and what is said when they die."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from standins import write_image_folder

from knlightning.data import BaseDataModule, ImageFolderDataModule, ResumableLoader
from knlightning.data.decoding import UnreadableImageError
from knlightning.data.loader import EvalLoader


class Failing:
    """Samples of which some raise an error, or end or stop the process that reads them."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            self.act()
        return torch.zeros(2), 0


def damaged():
    try:
        raise IndexError("list index out of range")
    except IndexError as error:
        raise UnreadableImageError("cat.jpg: cannot be read as an image (IndexError: 1)") from error


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("loader", [EvalLoader, ResumableLoader])
def test_a_damaged_file_is_one_line_whichever_process_reads_it(loader, workers):
    with pytest.raises(UnreadableImageError) as error:
        list(loader(Failing(damaged), num_workers=workers))
    assert str(error.value) == "cat.jpg: cannot be read as an image (IndexError: 1)"


def wrong():
    raise TypeError("my own transform")


def test_the_traceback_of_other_errors_stays():
    with pytest.raises(TypeError, match=r"(?s)Original Traceback.*in wrong.*my own transform"):
        list(EvalLoader(Failing(wrong), num_workers=1))


@pytest.mark.parametrize(
    ("act", "limit", "message"),
    [
        (killed, 60, r"A process that reads images has died.* Often the memory"),
        (stopped, 2, r"The processes that read images have given no batch for 2 seconds\. Often the memory"),
    ],
)
def test_a_process_that_has_died_or_stopped_is_said(act, limit, message):
    """In a process of its own: torch raises the death of a loader's process wherever the signal comes, later too."""
    code = f"""if True:
        from data.test_readers import *
        from knlightning.data import loader
        loader.READ_TIMEOUT = {limit}
        try:
            list(EvalLoader(Failing({act.__name__}), num_workers=1))
        except OSError as error:
            os.write(1, str(error).encode())
            os._exit(0)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert re.match(message, done.stdout), done.stderr


def test_a_process_without_images_gets_an_empty_batch(tmp_path, monkeypatch):
    write_image_folder(tmp_path, count=1)
    data = ImageFolderDataModule(tmp_path, num_workers=0, predict_dir=tmp_path / "val" / "cat")
    monkeypatch.setattr(BaseDataModule, "_ranks", lambda self: (4, 3))
    monkeypatch.setattr("knlightning.data.loader._several_processes", lambda: True)
    data.setup("validate")
    data.setup("predict")
    assert len(data.val_dataloader()) == 1
    ((images, labels),) = data.val_dataloader()
    assert (images.shape, labels.shape, labels.dtype) == ((0, 3, 224, 224), (0,), torch.int64)
    ((images, paths),) = data.predict_dataloader()
    assert (images.shape, paths) == ((0, 3, 224, 224), [])
