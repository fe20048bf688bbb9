"""Weights from files, for networks to be fine-tuned or evaluated."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from knlightning.checkpoint_files import read_checkpoint
from knlightning.models.norm_torch import IMAGENET, norm_torch_names
from knlightning.models.replaceable import Conv, KNConv

WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
MOST_LINES = 12
"""Names in an error."""


@dataclass(frozen=True)
class LoadedWeights:
    """What has become of the weights of a file; printed in one line.

    Attributes:
        taken: Names of the parameters and buffers that have the values of the file.
        anew: Names of those that keep the values with which the network was made.
        skipped: Names in the file that have no place in the network.
    """

    taken: tuple[str, ...]
    anew: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        skipped = [name for name in self.skipped if name not in self.anew]  # of another shape
        parts = [f"{kind}: {_few(names)}" for kind, names in (("new", self.anew), ("skipped", skipped)) if names]
        return "; ".join([f"{len(self.taken)} tensors taken", *parts])


def load_weights(
    network: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], whole: bool = False
) -> LoadedWeights:
    """Load weights into a network. All of it must fit, but for the last layer if its number of outputs is another.

    A network that `knlightning.models.kernel_normalize` has converted takes the weights of the original: those of the
    removed normalizations and running statistics are skipped, and the biases of convolutions that had none stay 0.

    Args:
        network: The network; it stays as it is if there is an error.
        source: File of a checkpoint of a run, whose backbone is taken; of a state dict, as torchvision and timm have
            them, by itself or under "model" or "state_dict"; of safetensors; or such a state dict. For a KNResNet it
            may have the published names; and "imagenet1k_norm_torch" downloads the published file.
        whole: Whether the last layer must fit too.

    Returns:
        What was taken and what was not.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be downloaded or opened.
        ValueError: If the file cannot be read without running code from it, or if a tensor is missing, extra or of
            another shape; the first of them are named.
    """
    where = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    state = _state_dict(network, source, where)
    own = network.state_dict()
    inner = {name: ".norm.".join(name.rsplit(".", 1)) for name in state}  # as `without_batch` makes it
    state = {name if name in own or inner[name] not in own else inner[name]: tensor for name, tensor in state.items()}
    fitting = {k: v for k, v in state.items() if k in own and isinstance(v, Tensor) and v.shape == own[k].shape}
    anew = tuple(name for name in own if name not in fitting)
    skipped = tuple(name for name in state if name not in fitting)
    head = None if whole else last_layer(network)
    owners = dict(network.named_modules())
    removed = {name for name in skipped if _is_removed(owners.get(name.rpartition(".")[0]), name)}
    problems = []
    for name in dict.fromkeys(anew + skipped):
        owner = owners.get(name.rpartition(".")[0])
        in_head = head is not None and owner is head
        of_converted = isinstance(owner, KNConv) and name.endswith(".bias") and removed and name not in state
        if not (in_head or of_converted or name in removed or name.endswith("num_batches_tracked")):
            problems.append(_problem(name, state, own))
    if problems:
        more = len(problems) - MOST_LINES
        lines = "\n  ".join(problems[:MOST_LINES] + ([f"and {more} more"] if more > 0 else []))
        raise ValueError(f"{where} does not fit this {type(network).__name__}; nothing was loaded:\n  {lines}")
    network.load_state_dict(fitting, strict=False)
    return LoadedWeights(tuple(fitting), anew, skipped)


def last_layer(network: nn.Module) -> nn.Module | None:
    """Return the linear layer or convolution that comes last in a network; None if it has none."""
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Linear, Conv, KNConv))]
    return layers[-1] if layers else None


def _state_dict(network: nn.Module, source: Any, where: str) -> dict[str, Any]:
    """Read a state dict, with the names of the network."""
    if source == IMAGENET:
        weights = getattr(network, "weights_enum", None)
        if weights is None:
            raise ValueError(f"{IMAGENET} are weights of knresnet18, 34 and 50, not of this {type(network).__name__}")
        source = weights[IMAGENET.upper()].get_state_dict()
    content = source if isinstance(source, Mapping) else read_weights(where)
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} holds a {type(content).__name__}; expected a state dict")
    state: dict[str, Any] = dict(content)
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            state = dict(content[key])
            break
    if "pytorch-lightning_version" in content:
        prefixes: tuple[str, ...] = ("backbone.",)
        state = {name: value for name, value in state.items() if name.startswith(prefixes)}
    else:
        prefixes = WRAPPERS
    for prefix in prefixes:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{where} holds no weights; expected a state dict")
    if "block0.0.weight" in state:
        names = norm_torch_names(network)
        state = {names.get(name, name): value for name, value in state.items()}
    return state


def read_weights(path: str) -> Any:
    """Read a file of weights, without running code from it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or safetensors is needed and not installed.
    """
    if not Path(path).is_file():
        folder = ", but a folder: name a file in it" if Path(path).is_dir() else ""
        raise FileNotFoundError(f"there is no file of weights {path}{folder}")
    if not path.endswith(".safetensors"):
        return read_checkpoint(path)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{path} needs safetensors: pip install 'knlightning[export]'") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not of safetensors: {error}") from error


def _is_removed(layer: nn.Module | None, name: str) -> bool:
    """Whether a tensor is of a normalization that conversion removed, or of the statistics that it replaced."""
    replaced = "running_" in name and isinstance(getattr(layer, "norm", layer), nn.GroupNorm)
    return replaced or (layer is not None and not layer.state_dict())


def _problem(name: str, state: Mapping[str, Any], own: Mapping[str, Tensor]) -> str:
    if name not in state:
        return f"missing: {name}"
    if not isinstance(state[name], Tensor):
        return f"not a tensor: {name} is a {type(state[name]).__name__}"
    if name not in own:
        return f"extra: {name}"
    return f"misshapen: {name} is {tuple(state[name].shape)}, needed {tuple(own[name].shape)}"


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
