"""Reading pickles from untrusted sources: data only, no code."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from knlightning.text import printable


class _Dtype:
    """Stands in for `numpy.dtype` of plain numbers.

    numpy's own takes flags from the pickle with which memory is read as objects; of the state here only the byte
    order is taken.
    """

    def __init__(self, name: str, align: int = 0, copy: int = 0) -> None:
        self.numpy = np.dtype(name)
        if self.numpy.kind not in "biuf":
            raise pickle.UnpicklingError(f"numpy dtype {name!r} is not allowed")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array(np.ndarray):
    """Array that takes its contents from a pickle with the stand-in dtype."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran_order, data = state
        super().__setstate__((version, shape, dtype.numpy, fortran_order, data))


def _reconstruct(array_type: str, shape: tuple[int, ...], dtype: bytes) -> _Array:
    """Stand in for numpy's function of this name: the empty array that a pickle then fills."""
    return _Array(0, np.uint8)


def _from_buffer(buffer: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """Stand in for numpy's function `_frombuffer`, with which protocol 5 writes an array."""
    array = np.frombuffer(buffer, dtype.numpy).reshape(shape, order="F" if order == "F" else "C")
    return array.astype(dtype.numpy.newbyteorder("="), copy=False)  # as numpy does in the other protocols


def _encode(text: str, encoding: str) -> bytes:
    """Stand in for `_codecs.encode`, with which Python 3 writes bytes into old pickles."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode(encoding)


_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): "only named, as an argument of _reconstruct",
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # written by numpy 1
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # written by numpy 2
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): bytes,  # called for b"" by Python 3 in old pickles
}


class _DataUnpickler(pickle.Unpickler):
    """Knows what pickle knows without imports (lists, dicts, strings, numbers), and arrays of numbers."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle that holds nothing but arrays of numbers, lists, tuples, dicts, sets, strings and numbers.

    Nothing else is imported or called, so a file made to run code cannot. Python 2's strings are read as latin-1.

    Args:
        path: The file.

    Returns:
        What was pickled.

    Raises:
        ValueError: If the file is truncated, no pickle, or holds anything else; the message names it.
        OSError: If the file cannot be opened.
    """
    with Path(path).open("rb") as file:
        try:
            return _DataUnpickler(file, encoding="latin1").load()
        except Exception as error:  # a damaged pickle may raise nearly anything
            raise ValueError(
                f"{path}: no pickle of plain data ({type(error).__name__}: {error}). The file is damaged or not what "
                "it should be; get it again from a source you trust."
            ) from error


def require_key(path: str | os.PathLike[str], content: Any, key: str) -> Any:
    """Return a value of the dict in a file.

    Args:
        path: The file, for the message.
        content: What it holds.
        key: Key of the value.

    Raises:
        ValueError: If the content is no dict, or does not have the key.
    """
    if not isinstance(content, dict) or key not in content:
        found = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: a dict with the key {key!r} is needed, found {printable(found):.200}.")
    return content[key]


def pixel_rows(path: str | os.PathLike[str], content: Any) -> np.ndarray:
    """Return the images of 32x32 pixels that the dict in a file has under "data", a row of 3072 pixels for each.

    Args:
        path: The file, for the message.
        content: What it holds.

    Returns:
        uint8 `(N, 3, 32, 32)`.

    Raises:
        ValueError: If there are no such rows.
    """
    data = require_key(path, content, "data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        found = f"{data.dtype} of shape {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path}: 'data' must be uint8 of shape (N, 3072), found {found}.")
    return data.reshape(-1, 3, 32, 32)
