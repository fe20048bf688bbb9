"""Import of the ImageNet weights that the authors of kernel normalization publish."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from knlightning.checkpoint_files import read_checkpoint
from knlightning.models.knresnet import Bottleneck, KNResNet
from knlightning.nn import KNConv2d


def load_norm_torch_weights(model: KNResNet, source: str | Path | Mapping[str, Any]) -> None:
    """Copy the weights of a published KNResNet into a model of the same shape.

    Args:
        model: A knresnet18, 34 or 50 with norm="kernel" and 1000 classes.
        source: Path of a checkpoint, or a state dict; either may hold the state dict under the key "model".

    Raises:
        FileNotFoundError: If the path is not a file.
        ValueError: If the file cannot be read without running code from it, or if a tensor is missing, extra or of
            another shape; all of them are named, and the model is left as it was.
    """
    where = "the state dict"
    if not isinstance(source, Mapping):
        where = str(source)
        if not Path(source).is_file():
            raise FileNotFoundError(f"no checkpoint at {where}")
        try:
            source = read_checkpoint(source)
        except Exception as error:
            raise ValueError(
                f"{where} is not a checkpoint of tensors alone, so it was not loaded: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(source, Mapping):
            raise ValueError(f"{where} holds a {type(source).__name__}; expected a state dict")
    state: Mapping[str, Any] = source["model"] if isinstance(source.get("model"), Mapping) else source

    names = norm_torch_names(model)
    own = model.state_dict()
    problems = [f"missing: {name}" for name in names if name not in state]
    problems += [f"extra: {name}" for name in state if name not in names]
    for name, ours in names.items():
        if name in state and not isinstance(state[name], Tensor):
            problems.append(f"not a tensor: {name} is a {type(state[name]).__name__}")
        elif name in state and state[name].shape != own[ours].shape:
            problems.append(f"misshapen: {name} is {tuple(state[name].shape)}, needed {tuple(own[ours].shape)}")
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{where} does not fit this {type(model).__name__}; nothing was loaded:\n  {lines}")
    model.load_state_dict({ours: state[name] for name, ours in names.items()})


def norm_torch_names(model: KNResNet) -> dict[str, str]:
    """Map the published names of a model's parameters to the names here.

    Args:
        model: A kernel normalized network.

    Returns:
        Names here by published name, in the order of the published files.

    Raises:
        ValueError: If the model is not kernel normalized.
    """
    if not any(isinstance(module, KNConv2d) for module in model.modules()):
        raise ValueError('published weights fit kernel normalized networks: build the model with norm="kernel"')
    pairs = [("block0.0", "stem.0")]
    count = 0
    for i, stage in enumerate(model.stages):
        if i > 0:
            pairs.append(
                (_published(model, f"trans_block{i}.conv", f"transitions.{i - 1}.1"), f"transitions.{i - 1}.1")
            )
        for j, block in enumerate(stage.children()):
            count += 1
            for k in (1, 2, 3) if isinstance(block, Bottleneck) else (1, 2):
                ours = f"stages.{i}.{j}.conv{k}"
                pairs.append((_published(model, f"res_block{count}.conv{k}", ours), ours))
    if isinstance(model.tail, nn.Sequential):
        pairs.append(("conv_block_f.conv", "tail.2"))
    pairs.append(("fc", "fc"))
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in pairs for kind in ("weight", "bias")}


def _published(model: KNResNet, name: str, ours: str) -> str:
    """Append what the published code calls a 1x1 convolution, which it wraps."""
    weight = model.get_submodule(ours).weight
    return f"{name}.conv1x1" if isinstance(weight, Tensor) and weight.shape[-1] == 1 else name
