"""The networks of this package by `torch.hub.load(CLONE, "knresnet50", source="local", weights=...)`."""

from knlightning.models import list_models

dependencies = ["torch", "torchvision"]
globals().update({model.name: model.make for model in list_models()})
