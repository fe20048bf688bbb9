"""Networks to the Hugging Face Hub and back: what is stored names a function of this package, which makes them anew."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from torch import nn

from knlightning.checks import check_choice
from knlightning.models.registry import list_models
from knlightning.models.weights import last_layer, read_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""What the files are called on the Hub."""
CARD = """---
{{ card_data }}
---

```python
from knlightning.models import HubModel

network = HubModel.from_pretrained("{{ repo_id | default("FOLDER", true) }}")
```
"""


class HubModel(nn.Module):
    """Base of the networks of this package, with the methods that take them to the Hugging Face Hub and back.

    They need the extra `hub`. `from_pretrained` of this class takes every network, that of a subclass its own.
    """

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write `config.json` with the name and the arguments of the network, `model.safetensors`, and a `README.md`.

        Args:
            save_directory: Folder, made if need be; a `README.md` in it stays.
            **options: As in `huggingface_hub.ModelHubMixin.save_pretrained`.

        Raises:
            ValueError: If the network is not as a function of `knlightning.models` makes it; its last linear layer may
                have another number of outputs.
            ImportError: If huggingface_hub or safetensors is not installed.
        """
        _stored(self).save_pretrained(save_directory, config=_description(self), **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; the same errors are raised.

        Args:
            repo_id: Name on the Hub, such as "me/net"; the repository is made if need be.
            **options: As in `huggingface_hub.ModelHubMixin.push_to_hub`, such as `private` and `token`.

        Returns:
            Address of the commit.
        """
        options = {"model_card_kwargs": {"repo_id": repo_id}} | options
        address: str = _stored(self).push_to_hub(repo_id, config=_description(self), **options)
        return address

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
    ) -> Self:
        """Make a network again from what `save_pretrained` wrote; no code in it is run or imported.

        Args:
            name_or_path: The folder, or else the name on the Hub.
            revision: Branch, tag or commit on the Hub; None for the latest.
            token: Token of the Hub; None for the one of `hf auth login`.

        Returns:
            The network, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such folder, or a file is missing in it.
            ValueError: If it does not hold a network of this class and release, or weights that do not fit.
            ImportError: If huggingface_hub or safetensors is not installed.
        """
        hub, folder = _hub(), os.fspath(name_or_path)
        try:
            if not os.path.isdir(folder):
                files = [CONFIG, WEIGHTS]
                folder = hub.snapshot_download(folder, revision=revision, token=token, allow_patterns=files)
        except hub.errors.HFValidationError as error:
            raise FileNotFoundError(f"{folder} is no folder, and no name on the Hub such as me/net") from error
        text, state = Path(folder, CONFIG).read_bytes(), read_weights(os.path.join(folder, WEIGHTS))
        try:
            network = _make(json.loads(text))
            network.load_state_dict(state, assign=True)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder} holds no network of this release of knlightning: {error}") from error
        if not isinstance(network, cls):
            raise ValueError(f"{folder} holds a {type(network).__name__}, which is no {cls.__name__}")
        return network.eval()


def _hub() -> ModuleType:
    try:
        import huggingface_hub  # slow
        import safetensors.torch  # noqa: F401 # for a message before anything is written
    except ImportError as error:
        raise ImportError(f"the Hub needs {error.name}: pip install 'knlightning[hub]'") from error
    return huggingface_hub


def _stored(network: nn.Module) -> Any:
    """Give a network the methods of huggingface_hub."""
    _hub()
    from huggingface_hub import ModelHubMixin
    from safetensors.torch import save_file

    class Stored(ModelHubMixin, library_name="knlightning", tags=["kernel-normalization"], model_card_template=CARD):
        def _save_pretrained(self, save_directory: Path) -> None:
            state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
            save_file(state, save_directory / WEIGHTS, {"format": "pt"})

    return Stored()


def _description(network: nn.Module) -> dict[str, Any]:
    """Describe a network by plain values, if its function makes the same of them."""
    made_by: dict[str, Any] | None = getattr(network, "made_by", None)
    instead = "store its state_dict() instead"
    if made_by is None:
        raise ValueError(f"no function of knlightning.models has made this {type(network).__name__}; {instead}")
    arguments = dict(made_by["model_args"])
    if isinstance(last := last_layer(network), nn.Linear):
        arguments["num_classes"] = last.out_features
    config = {"architecture": made_by["architecture"], "model_args": arguments, "pretrained_cfg": {}}  # as timm has it
    config = json.loads(json.dumps(config, default=lambda number: number.item()))  # of numpy
    own, made = _parts(network), _parts(_make(config))
    for name in dict.fromkeys([*own, *made]):
        if own.get(name) != made.get(name):
            difference = f"{name or 'it'} is {own.get(name, 'missing')} in place of {made.get(name, 'nothing')}"
            raise ValueError(f"this is not what {config['architecture']} makes: {difference}; {instead}")
    return config


def _make(config: Mapping[str, Any]) -> nn.Module:
    """Make a network by its description, without weights."""
    makers = {model.name: model.make for model in list_models()}
    check_choice("architecture", name := config.get("architecture"), tuple(makers))
    arguments = config.get("model_args", {})
    if isinstance(arguments, Mapping) and "weights" in arguments:  # those of the authors would be downloaded
        raise ValueError("weights is no argument of what is stored")
    with torch.device("meta"):
        return makers[str(name)](**arguments)


def _parts(network: nn.Module) -> dict[str, str]:
    layers = {name: f"{type(layer).__name__}({layer.extra_repr()})" for name, layer in network.named_modules()}
    return layers | {name: f"of shape {tuple(tensor.shape)}" for name, tensor in network.state_dict().items()}
