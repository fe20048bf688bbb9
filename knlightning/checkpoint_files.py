"""Checkpoints as files: the one reader, which takes them only if they are whole and hold what a checkpoint holds."""

import json
import os
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

PARTS: dict[str, type] = {"global_step": int, "epoch": int, "state_dict": dict}
"""What every checkpoint of a run holds, and its type."""
PARTS_TO_RESUME: dict[str, type] = {"loops": dict, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list}
"""What it holds besides if training can go on from it."""
COUNTS = ("last_epoch", "_step_count")
"""What a schedule counts."""
MOST_VALUES, DEEPEST = 10**6, 100
"""A checkpoint with more values, tensors counted as one, or deeper lists and dictionaries was made to do harm."""


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """Read a file that `torch.save` has written, after its checksums were verified; no code in it is run.

    Args:
        path: The file.
        map_location: Where the tensors go, as in `torch.load`; "meta" reads everything but their values.

    Returns:
        What was saved.

    Raises:
        ValueError: If the file is damaged, or something else; the message names it.
        OSError: If it cannot be opened.
    """
    with Path(path).open("rb") as file:
        try:
            _verify(file)
            file.seek(0)
            content = torch.load(file, map_location=map_location, weights_only=True)
            _check_size(content)
        except Exception as error:  # what damaged bytes make a decoder raise can be anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if isinstance(error, UnpicklingError | LookupError):  # torch's own text tells how to run code from the file
                reason = "it holds more than tensors and plain values, or none; of a network, save the state_dict()"
            raise ValueError(f"{os.fspath(path)} is damaged, or not a checkpoint: {reason}") from error
    return content


def holds_weights_alone(content: Any) -> bool:
    """Say whether a file holds no checkpoint of a run but a state dict, by itself or under "state_dict" or "model"."""
    if not isinstance(content, dict) or "global_step" in content:
        return False
    return _is_state_dict(content.get("state_dict", content.get("model", content)))


def check_checkpoint(path: str | os.PathLike[str], content: Any, to_resume: bool) -> None:
    """Check that what a file holds is a checkpoint of a run.

    Args:
        path: The file, for the message.
        content: What was read.
        to_resume: Whether training is to go on from it.

    Raises:
        ValueError: If it is none; the message names the file and the part that is missing or wrong.
    """
    wanted = PARTS | (PARTS_TO_RESUME if to_resume else {})
    part = "its content"
    if isinstance(content, dict):
        wrong = [name for name, kind in wanted.items() if not isinstance(content.get(name), kind)]
        wrong += [name for name in ("global_step", "epoch") if name not in wrong and content[name] < 0]
        if "state_dict" not in wrong and content["state_dict"] and not _is_state_dict(content["state_dict"]):
            wrong.append("state_dict")
        if to_resume:
            states = {name: content[name] for name in PARTS_TO_RESUME if name not in wrong}
            states |= {name: part.values() for name, part in states.items() if isinstance(part, dict)}
            wrong += [name for name, part in states.items() if not all(isinstance(state, dict) for state in part)]
            counts = [state.get(key, 0) for state in states.get("lr_schedulers", ()) for key in COUNTS if not wrong]
            if not all(isinstance(count, int) for count in counts):
                wrong.append("lr_schedulers")
            if not re.match(r"\d+\.\d+", str(content.get("pytorch-lightning_version", "0.0"))):
                wrong.append("pytorch-lightning_version")
        part = ", ".join(repr(name) for name in wrong)
    if part:
        raise ValueError(f"{os.fspath(path)} is damaged, or not a checkpoint of a run: {part} is missing or wrong")


def stored_config(content: Any, key: str = "config") -> Any:
    """Return what `knlightning.callbacks.RunConfig` has stored in a checkpoint; an empty dictionary for nothing.

    Args:
        content: What `read_checkpoint` returns.
        key: "config" for the configuration of the run, "job" for the number of its SLURM job.
    """
    callbacks = content.get("callbacks") if isinstance(content, dict) else None
    state = callbacks.get("RunConfig") if isinstance(callbacks, dict) else None
    return state.get(key, {}) if isinstance(state, dict) else {}


def plain_config(path: str | os.PathLike[str], content: Any) -> dict[str, Any]:
    """Return the configuration of the run that has written a checkpoint; an empty one if it is not stored.

    Args:
        path: The file, for the message.
        content: What was read.

    Raises:
        ValueError: If it is not made of dictionaries, lists and plain values.
    """
    try:
        plain = json.loads(json.dumps(stored_config(content)))
    except (TypeError, ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict):
        raise ValueError(f"{os.fspath(path)} is damaged: the configuration in it is none")
    return plain


def _verify(file: BinaryIO) -> None:
    """Verify the checksums of a file."""
    if not zipfile.is_zipfile(file):  # the form of torch.save until 2020, without checksums
        return
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise ValueError("it is compressed, which torch.save does not do")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its part {damaged!r} is wrong")


def _check_size(content: Any) -> None:
    """Refuse lists in lists that grow without end when they are walked through."""
    count, rest = 0, [(content, 0)]
    while rest:
        value, depth = rest.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            raise ValueError("it holds too many values, or lists in lists in lists without end")
        if isinstance(value, dict):
            rest.extend((inner, depth + 1) for inner in value.values())
        elif isinstance(value, (list, tuple, set)):
            rest.extend((inner, depth + 1) for inner in value)


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())
