"""Damaged files of every kind: each one is read rightly, or refused by an error that names it; none of them hangs.

KNL_FUZZ_FILES is their number, KNL_FUZZ_SEED makes others.
"""

import faulthandler
import json
import math
import os
import pickle
import random
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from knlightning.callbacks import MetricsCSV
from knlightning.checkpoint_files import check_checkpoint, read_checkpoint
from knlightning.commands.trials import read_result
from knlightning.commands.yaml_text import load_yaml
from knlightning.data.decoding import FORMATS, decoded
from knlightning.data.image_cache import RECORD, mapped, write_records
from knlightning.data.imagenet32_files import CLASS_MAP, read_blocks, read_class_map
from knlightning.privacy.ledger import Ledger, read_report, write_report

FILES = int(os.environ.get("KNL_FUZZ_FILES", "1000"))
SEED = int(os.environ.get("KNL_FUZZ_SEED", "0"))
SECONDS = 60
"""After which the process ends with a traceback; a file takes milliseconds."""
CHECKPOINT = {
    "epoch": 1,
    "global_step": 5,
    "state_dict": {"a": torch.arange(300.0)},
    "loops": {},
    "callbacks": {},
    "optimizer_states": [{"state": {}}],
    "lr_schedulers": [{"last_epoch": 5}],
}


def pixels():
    return np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


def image(kind):
    def write(path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels()).save(path, kind, **({"exif": exif} if kind in ("JPEG", "WEBP", "PNG") else {}))

    def read(path):
        assert decoded(path).mode == "RGB"

    return "image.jpg", write, read


def arrays():
    return {"data": np.random.default_rng(0).integers(0, 9, (3, 3072), np.uint8), "labels": [1, 2, 1000]}


def read_arrays(path):
    for images, labels in read_blocks([path]):
        assert images.shape == (len(labels), 3, 32, 32)
        assert all(0 <= label < 1000 for label in labels)


def read_whole_checkpoint(path):
    content = read_checkpoint(path)
    check_checkpoint(path, content, to_resume=True)
    assert torch.equal(content.pop("state_dict")["a"], CHECKPOINT["state_dict"]["a"])
    assert content == {name: part for name, part in CHECKPOINT.items() if name != "state_dict"}


def write_metrics(path):
    log = MetricsCSV(path.parent)
    for step in range(5):
        log.log_metrics({"a": step / 3, "b": "text"}, step)


def read_metrics(path):
    log = MetricsCSV(path.parent, 3)
    log.log_metrics({"a": 1.0}, 3)
    assert log._read()[-1]["step"] == "3"


def write_privacy(path):
    ledger = Ledger(1e-5, "rdp")
    for _ in range(3):
        ledger.record(1.0, 0.1)
    write_report(path.parent, ledger.report({"target_delta": 1e-5}, None))


def read_privacy(path):
    report = read_report(path.parent)
    for _, noise, probability, steps in report.get("segments", []):
        assert noise >= 0
        assert 0 <= probability <= 1
        assert steps >= 0


def read_accuracies(path):
    result = read_result(path)
    assert all(0 <= accuracy <= 1 for accuracy in result["accuracies"].values())


def read_classes(path):
    assert len(read_class_map(path.parent)) == 1000


def read_cache(path):
    assert mapped(path).dtype == RECORD


KINDS = {
    **{kind: image(kind) for kind in FORMATS},
    "npz": ("val_data.npz", lambda path: np.savez(path, **arrays()), read_arrays),
    "compressed npz": ("val_data.npz", lambda path: np.savez_compressed(path, **arrays()), read_arrays),
    "pickle": ("val_data", lambda path: path.write_bytes(pickle.dumps(arrays(), 2)), read_arrays),
    "checkpoint": ("last.ckpt", lambda path: torch.save(CHECKPOINT, path), read_whole_checkpoint),
    "metrics": ("metrics.csv", write_metrics, read_metrics),
    "privacy": ("privacy.json", write_privacy, read_privacy),
    "result": (
        "result.json",
        lambda path: path.write_text(json.dumps({"settings": {"a": "1"}, "accuracies": {"val": 0.5, "test": 0.25}})),
        read_accuracies,
    ),
    "classes": (
        CLASS_MAP,
        lambda path: path.write_text("".join(f"n{number:08} {number} name\n" for number in range(1, 1001))),
        read_classes,
    ),
    "cache": ("cache.npy", lambda path: write_records(path, [(np.zeros((4, 3, 32, 32)), np.arange(4))]), read_cache),
    "configuration": (
        "config.yaml",
        lambda path: path.write_text("model: {a: [1, 2.5, null]}\ndata: &d {b: 'text'}\ntrainer: *d\n"),
        lambda path: load_yaml(path.read_text(), str(path)),
    ),
}


def damage(whole, generator):
    """Overwrite, turn, cut, lengthen or shift bytes: more often at the beginning, where the heads of formats are."""
    content = bytearray(whole)
    end = min(len(content), generator.choice([30, 200, 10**6]))
    for _ in range(generator.choice([1, 1, 3, 10])):
        place = generator.randrange(end) if generator.random() < 0.8 else len(content) - 1 - generator.randrange(end)
        content[place] = generator.choice(
            [content[place] ^ 1 << generator.randrange(8), generator.randrange(256), 0, 255]
        )
    if generator.random() < 0.3:
        content = content[: generator.randrange(len(content) + 1)]
    if generator.random() < 0.1:
        content[generator.randrange(len(content) + 1) :] += bytes(generator.randrange(1, 5000))
    if generator.random() < 0.1:
        place = generator.randrange(len(content) + 1)
        content[place:place] = generator.choice([b"\0", b"\n", b"\xef\xbb\xbf", b"-1", b"9" * 30, whole[:50]])
    return bytes(content)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_named(tmp_path, kind):
    name, write, read = KINDS[kind]
    path, generator = tmp_path / name, random.Random(f"{kind} {SEED}")
    write(path)
    read(path)
    whole = path.read_bytes()
    named = 0
    for _ in range(math.ceil(FILES / len(KINDS))):
        path.unlink(missing_ok=True)
        path.write_bytes(damage(whole, generator))
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
        try:
            read(path)
        except (ValueError, yaml.YAMLError) as error:
            message = str(error)
            assert str(path) in message or kind == "configuration"  # whose bytes that are no text the command names
            named += 1
        finally:
            faulthandler.cancel_dump_traceback_later()
    assert named or kind in ("metrics", "BMP", "cache")
