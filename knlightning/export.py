"""Write a trained network for other programs.

Beside the files of the network lies `preprocessing.json`, which says what they expect of an image and what their
outputs are called; files of the formats that have room for it hold the same (`Format`). It is the network that is
written, without the mirrored images, windows and scales of the task. Every file is read back and compared with the
network before any of them is put in its place.
"""

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from knlightning.checks import check, check_choice
from knlightning.protocols import describe
from knlightning.run_directory import replacing

TOLERANCE = 1e-3
"""Largest difference of an output that is accepted, as a fraction of the largest output."""
CHECKED_BATCHES = (1, 3)
INPUT, OUTPUT = "images", "logits"
PREPROCESSING = "preprocessing.json"
RESIZE_FILTER = "bilinear, with antialiasing, as PIL.Image.Resampling.BILINEAR"

Forward = Callable[[Tensor], Tensor]
"""From images to logits."""


def _write_state_dict(model: nn.Module, images: Tensor, path: Path, texts: Mapping[str, str]) -> None:
    torch.save(model.state_dict(), path)


def _read_state_dict(model: nn.Module, path: Path) -> Forward:
    network = _emptied(model)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


def _write_safetensors(model: nn.Module, images: Tensor, path: Path, texts: Mapping[str, str]) -> None:
    from safetensors.torch import save_model

    save_model(model, str(path), dict(texts))  # unlike save_file, also where two names share a tensor


def _read_safetensors(model: nn.Module, path: Path) -> Forward:
    from safetensors.torch import load_model

    network = _emptied(model)
    load_model(network, str(path))
    return network


def _write_torch_export(model: nn.Module, images: Tensor, path: Path, texts: Mapping[str, str]) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=_batch_of_any_size())
    torch.export.save(program, path, extra_files=dict(texts))


def _read_torch_export(model: nn.Module, path: Path) -> Forward:
    return torch.export.load(path).module()


def _write_onnx(model: nn.Module, images: Tensor, path: Path, texts: Mapping[str, str]) -> None:
    program = torch.onnx.export(
        model,
        (images,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=_batch_of_any_size(),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(texts)
    program.save(path, external_data=False)  # one file


def _read_onnx(model: nn.Module, path: Path) -> Forward:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


@dataclass(frozen=True)
class Format:
    """How a network is written to a file, and read from it.

    Args:
        file: Name of the file.
        packages: Packages of the extra `export` that it needs.
        write: Writes a network; the images are an example of its input, and the texts its preprocessing: metadata of
            safetensors and ONNX, and extra files of torch.export.
        read: Reads it again, given the network for its structure.
    """

    file: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, Path, Mapping[str, str]], None]
    read: Callable[[nn.Module, Path], Forward]


FORMATS = {
    "state_dict": Format("weights.pt", (), _write_state_dict, _read_state_dict),
    "safetensors": Format("weights.safetensors", ("safetensors",), _write_safetensors, _read_safetensors),
    "torch_export": Format("model.pt2", (), _write_torch_export, _read_torch_export),
    "onnx": Format("model.onnx", ("onnx", "onnxruntime", "onnxscript"), _write_onnx, _read_onnx),
}


def export(
    model: nn.Module, to: Path, formats: Sequence[str], image_size: tuple[int, int], preprocessing: dict[str, Any]
) -> dict[str, float]:
    """Write a network in several formats, each checked against the network itself.

    The check compares the outputs for random images, in batches of 1 and 3: the number of images is free in every
    format, their size is not. If it or anything else fails, nothing is written.

    Args:
        model: From images (N, 3, H, W), float32 in [0, 1] or normalized, to logits (N, classes) or (N, classes, H, W);
            left as it is.
        to: Directory; made if need be, and empty.
        formats: Names in `FORMATS`.
        image_size: H and W of the images.
        preprocessing: Plain values for `preprocessing.json`; the files hold them as texts, those that are none as JSON.

    Returns:
        The largest difference of an output, by file.

    Raises:
        ValueError: If a format is unknown or lacks a package, if the directory is not empty, if the network draws
            random numbers or cannot be written in a format, if the preprocessing names another number of classes,
            or if a file does not do what the network does.
    """
    check_request(to, formats)
    model = copy.deepcopy(model).float().to(memory_format=torch.contiguous_format).eval()  # not compiled, either
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(count, 3, *image_size, generator=generator) for count in CHECKED_BATCHES]
    differences = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = [model(images) for images in batches]
        if any(not torch.equal(model(images), logits) for images, logits in zip(batches, expected, strict=True)):
            raise ValueError(
                "the network gives other outputs when it is applied again (or none that are numbers), so nothing was"
                " exported; a kernel normalized one needs eval_statistics clean or expected"
            )
        names, width = preprocessing.get("classes"), expected[0].shape[1]
        if names is not None and len(names) != width:
            raise ValueError(f"the network has {width} outputs and the data {len(names)} classes; nothing was exported")
        limit = TOLERANCE * max(float(logits.abs().max()) for logits in expected)
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in preprocessing.items()}
        for name in dict.fromkeys(formats):
            path = Path(folder) / FORMATS[name].file
            outputs = _written_and_read(name, model, batches, path, texts)
            pairs = zip(outputs, expected, strict=True)
            difference = max(float((output - logits).abs().max()) for output, logits in pairs)
            if not difference <= limit:
                raise ValueError(
                    f"{path.name} differs from the network by up to {difference:.3g}, more than {limit:.3g}, so nothing"
                    " was exported"
                )
            differences[path.name] = difference
        (Path(folder) / PREPROCESSING).write_text(json.dumps(preprocessing, indent=2, ensure_ascii=False) + "\n")
        try:
            for file in (*differences, PREPROCESSING):
                with replacing(to / file) as temporary:
                    shutil.copyfile(Path(folder) / file, temporary)
        except BaseException:  # no room, or an interruption
            shutil.rmtree(to, ignore_errors=True)  # which was empty
            raise
    return differences


def check_request(to: Path, formats: Sequence[str]) -> None:
    """Check what is asked for.

    Args:
        to: Directory for the files.
        formats: Names in `FORMATS`.

    Raises:
        ValueError: If a format is unknown or lacks a package, or if the directory is not empty.
    """
    for name in formats:
        check_choice("formats", name, list(FORMATS))
        if missing := [package for package in FORMATS[name].packages if find_spec(package) is None]:
            raise ValueError(f"the format {name} needs {', '.join(missing)}: pip install 'knlightning[export]'")
    check(not to.exists() or (to.is_dir() and not any(to.iterdir())), "to", str(to), "a new or an empty directory")


def preprocessing_of(
    datamodule: LightningDataModule, of_pixels: bool = False, image_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Describe what a network trained on the data expects of an image, in plain values.

    Args:
        datamodule: One of knlightning.data, or one with the same attributes; what it lacks is left out.
        of_pixels: Whether the network tells the class of each pixel.
        image_size: Height and width of the images; None for those of the datamodule.

    Returns:
        "input" and "output" in words; "image_size" (height, width), which is cut out of the middle; "resize", the
        length in pixels to which the shorter side is brought before, or None for the least that covers `image_size`,
        and "resize_filter" in words; "scaling", "mean" and "std", by which 8-bit values become
        (value / 255 - mean) / std for each channel, and "range", the lowest and the highest that they can become;
        "classes" in the order of the logits. With `of_pixels` "image_size" is that of whole images, there is no
        "resize", and there are "palette", red, green and blue of each class, and "label_ids", its number in files.
    """
    shape = "(N, classes, height, width), for each pixel" if of_pixels else "(N, classes)"
    description: dict[str, Any] = {
        "input": f"{INPUT}: float32, (N, 3, height, width), RGB",
        "output": f"{OUTPUT}: float32, {shape}; softmax gives probabilities",
    }
    data = describe(datamodule)
    if (size := image_size or data.image_size) is not None:
        description["image_size"] = list(size)
        if not of_pixels:
            description |= {"resize": (data.hparams or {}).get("eval_resize"), "resize_filter": RESIZE_FILTER}
    if data.scaling is not None and data.mean is not None and data.std is not None:
        standard = data.scaling == "standard"
        description["scaling"] = data.scaling
        mean = list(data.mean) if standard else [0.0] * len(data.mean)
        std = list(data.std) if standard else [1.0] * len(data.std)
        description |= {"mean": mean, "std": std}
        ends = [[(end - m) / s for m, s in zip(mean, std, strict=True)] for end in (0, 1)]
        description["range"] = [min(ends[0]), max(ends[1])]
    if data.class_names is not None:
        description["classes"] = list(data.class_names)
    if of_pixels and data.palette is not None:
        description["palette"] = list(data.palette)
    if of_pixels and data.label_ids is not None:
        description["label_ids"] = list(data.label_ids)
    return description


def _written_and_read(
    name: str, model: nn.Module, batches: list[Tensor], path: Path, texts: Mapping[str, str]
) -> list[Tensor]:
    """Write a network, and return what the file makes of batches of images."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            FORMATS[name].write(model, batches[-1], path, texts)
            network = FORMATS[name].read(model, path)
            return [network(images) for images in batches]
    except Exception as error:  # whatever an exporter makes of a network it does not understand
        raise ValueError(
            f"the network cannot be written in the format {name}; nothing was exported: {error}"
        ) from error


def _batch_of_any_size() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


def _emptied(model: nn.Module) -> nn.Module:
    """Copy a network without its weights, so that one that is not read shows."""
    model = copy.deepcopy(model)
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model
