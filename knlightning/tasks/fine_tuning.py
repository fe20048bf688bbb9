"""Training that begins with weights from before, and leaves some of them as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from knlightning.checks import check, check_number
from knlightning.models.weights import last_layer
from knlightning.text import counted

_following: ContextVar[bool] = ContextVar("weights_follow", default=False)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Let tasks that are made meanwhile leave their `init_from` alone: the weights of a checkpoint follow."""
    token = _following.set(True)
    try:
        yield
    finally:
        _following.reset(token)


def do_weights_follow() -> bool:
    """Say whether the weights of a checkpoint follow."""
    return _following.get()


class Freezing:
    """Keeps parts of a network as they are, up to an epoch or to the end of the run.

    A frozen part is in evaluation mode: its batch normalization keeps its statistics, and nothing in it is dropped.
    Which parts are frozen follows from the epoch alone, so that a resumed run freezes the same.

    Args:
        network: The network.
        names: Names of modules and parameters, in a list or separated by commas; "all" for all but the last layer.
        thaw_epoch: The epoch, counted from 0, from which on everything is trained; None for never.

    Raises:
        ArgumentError: If the epoch is below 1, or given although nothing is frozen.
        ValueError: If nothing with parameters has one of the names.
    """

    def __init__(self, network: nn.Module, names: Sequence[str] | str, thaw_epoch: int | None) -> None:
        check_number("thaw_epoch", thaw_epoch, at_least=1, integer=True, none="never")
        chosen = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
        chosen = [name for name in chosen if name]
        check(bool(chosen) or thaw_epoch is None, "thaw_epoch", thaw_epoch, "null where freeze names nothing")
        if chosen == ["all"]:
            head = last_layer(network)
            chosen = [name for name, layer in network.named_modules() if head not in layer.modules()]
            chosen += [name for name, _ in network.named_parameters() if _owner(network, name) is not head]
        else:
            _check_names(network, chosen)
        self.thaw_epoch = thaw_epoch
        self.frozen = False
        self._modules = [layer for name, layer in network.named_modules() if _is_within(name, chosen)]
        self._parameters = [
            parameter
            for name, parameter in network.named_parameters()
            if _is_within(name, chosen) and parameter.requires_grad
        ]
        if thaw_epoch is None:  # for good: before DistributedDataParallel looks which parameters have gradients
            for parameter in self._parameters:
                parameter.requires_grad_(False)

    def apply(self, epoch: int) -> None:
        """Freeze or thaw what an epoch asks for."""
        frozen = bool(self._modules or self._parameters) and (self.thaw_epoch is None or epoch < self.thaw_epoch)
        if not frozen and not self.frozen:
            return
        self.frozen = frozen
        for layer in self._modules:
            layer.training = not frozen
        for parameter in self._parameters:
            parameter.requires_grad_(not frozen)

    def describe(self, max_epochs: int | None) -> str:
        """Say what is frozen in a run of so many epochs, -1 and None for no limit; "" for nothing."""
        text = counted(len(self._parameters), "tensor") if self._parameters else ""
        if not text or self.thaw_epoch is None:
            return text
        reached = max_epochs in (None, -1) or self.thaw_epoch < max_epochs
        return f"{text} before epoch {self.thaw_epoch}" + ("" if reached else ", which this run does not reach")

    def begin(self, task: LightningModule) -> None:
        """Freeze or thaw when training starts, and check that something is trained.

        Args:
            task: With the network, in `fit`.

        Raises:
            ValueError: If no parameter is trained, or if several devices wait for the gradients of what is frozen.
        """
        self.apply(task.current_epoch)
        if not any(parameter.requires_grad for parameter in task.parameters()):
            raise ValueError(
                "no parameter is trained, since all of them are frozen. The callback BackboneFinetuning freezes the"
                " whole network with its last layer: the task's argument freeze takes names of layers, or all"
            )
        wrapped = task.trainer.strategy.model
        waits = isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters
        if waits and self.frozen and self.thaw_epoch is not None:
            raise ValueError(
                "thaw_epoch: on several devices the trainer's strategy must be ddp_find_unused_parameters_true, since"
                " ddp waits for the gradients of layers that are frozen for a while"
            )


def _owner(network: nn.Module, parameter: str) -> nn.Module:
    return network.get_submodule(parameter.rpartition(".")[0])


def _is_within(name: str, chosen: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{each}.") for each in chosen)


def _check_names(network: nn.Module, chosen: Sequence[str]) -> None:
    parameters = [name for name, _ in network.named_parameters()]
    if unknown := [each for each in chosen if not any(_is_within(name, [each]) for name in parameters)]:
        parts = ", ".join(name for name, _ in network.named_children())
        raise ValueError(f"freeze: nothing with parameters is named {', '.join(unknown)}; the network has {parts}")
