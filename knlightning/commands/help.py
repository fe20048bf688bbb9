"""What the help of the commands says of the arguments of a run."""

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from knlightning.callbacks import CONFIGURED
from knlightning.commands.early import OPTIONS
from knlightning.commands.names import short_names
from knlightning.internals.jsonargparse import set_choices, set_titles


def explain(parser: ArgumentParser) -> None:
    """Give the groups of arguments their titles, and let the help of networks, tasks and data name ours.

    Args:
        parser: Of the configuration of a run. Without this its help names every class that is imported.
    """
    titles = {key: OPTIONS[key] for key in ("model", "data", "trainer")}
    set_titles(parser, titles | {key: title for key, (_, title) in CONFIGURED.items()})
    kinds = {nn.Module: "models", LightningModule: "tasks", LightningDataModule: "data"}
    texts: dict[type, str] = {}
    for kind, package in kinds.items():
        found = [name for name, path in short_names().items() if path.split(".")[1] == package]
        made = [name for name in found if package != "data" or name.endswith("DataModule")]
        texts[kind] = f"one of {', '.join(made)}, or a class or function of your own by its import path"
    set_choices(texts)
