"""The networks of this package by timm: `import knlightning.timm`, then `timm.create_model("knresnet50")`.

Those are left out whose names timm has itself, such as resnet18.
"""

from pathlib import Path
from typing import Any

import timm
from torch import nn

from knlightning.models import KNResNet18_Weights, Model, list_models, load_weights
from knlightning.models.hub import WEIGHTS
from knlightning.models.norm_torch import IMAGENET


def _register(model: Model) -> None:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Make a network by the arguments of `timm.create_model`, of which `pretrained` takes the published weights.

        For `hf-hub:NAME` and `local-dir:FOLDER`, which timm resolves, it takes those that `save_pretrained` wrote.
        """
        stored = pretrained_cfg if isinstance(pretrained_cfg, dict) and "source" in pretrained_cfg else None
        kwargs.pop("pretrained_model_args", None)  # those of what is stored, before changes by the user
        if pretrained and stored is None:
            if not model.weights:
                raise ValueError(f"there are no published weights of {model.name}: leave out pretrained")
            kwargs["weights"] = IMAGENET
        if num_classes:  # 0 is for no last layer
            kwargs["num_classes"] = num_classes
        network: Any = model.make(**kwargs)
        if pretrained and stored is not None:
            load_weights(network, _weights(stored, cache_dir))
        if num_classes == 0:
            network.reset_classifier(0)
        network.pretrained_cfg = network.default_cfg = {  # what timm.data.resolve_data_config reads
            "architecture": model.name,
            "input_size": (3, *_PREPROCESSING.crop_size * 2),
            "crop_pct": _PREPROCESSING.crop_size[0] / _PREPROCESSING.resize_size[0],
            "interpolation": _PREPROCESSING.interpolation.value,
            "mean": tuple(_PREPROCESSING.mean),
            "std": tuple(_PREPROCESSING.std),
            "classifier": network.last_name,
        }
        return network

    create.__name__ = model.name
    timm.models.register_model(create)


def _weights(stored: dict[str, Any], cache_dir: Any) -> Any:
    if "file" in stored:
        return Path(stored["file"], WEIGHTS)
    return timm.models.load_state_dict_from_hf(stored["hf_hub_id"], cache_dir=cache_dir)


_PREPROCESSING = KNResNet18_Weights.IMAGENET1K_NORM_TORCH.transforms()
_THEIRS = set(timm.list_models())
for _model in list_models():
    if _model.task == "classification" and _model.name not in _THEIRS:
        _register(_model)
