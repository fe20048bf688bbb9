"""If a test fails here, a release of torch has changed what `knlightning/internals/torch.py` reads: mend it there."""

import multiprocessing
import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from knlightning.internals.torch import (
    changing_draws,
    convolves_as,
    found_too_small,
    function_transforms_active,
    has_hooks,
    is_compiled,
    is_loss_of_peer,
    version_of,
    worker_failure,
    worker_message,
    workers_of,
)


def test_transforms_are_seen_while_they_run():
    seen = []

    def function(x):
        seen.append(function_transforms_active())
        return x

    torch.func.grad(function)(torch.ones(()))
    torch.func.vmap(function)(torch.ones(1))
    function(torch.ones(()))
    with torch.autograd.forward_ad.dual_level():
        function(torch.ones(()))
    hint = "torch tells in another way that a transform runs: see what torch.autograd.Function.apply itself asks"
    assert seen == [True, True, False, True], hint


DRAWS = {
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "rand": lambda x: torch.rand(len(x), generator=torch.Generator().manual_seed(1)),
    "rand_like": torch.rand_like,
    "uniform_": lambda x: torch.empty_like(x).uniform_(2, 3),
    "randint": lambda x: torch.randint(5, (4,)),
    "bernoulli_": lambda x: torch.empty_like(x, dtype=torch.bool).bernoulli_(0.3),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_are_seen_and_can_be_changed(draw):
    seen, x = [], torch.ones(4, requires_grad=True)
    with changing_draws(seen.append):
        draw(x)
    with changing_draws(lambda values: values.zero_()):
        assert not draw(x).any(), "torch draws in another way: see the tag nondeterministic_seeded of its functions"
    assert len(seen) == 1


def test_draws_that_depend_on_values_are_left_out():
    seen = []
    with changing_draws(seen.append):
        torch.randperm(4)
        torch.multinomial(torch.ones(4), 2)
        torch.bernoulli(torch.rand(4) * 0)
    assert len(seen) == 1  # rand


def test_dropout_of_gpus_uses_the_changed_mask():
    x = torch.rand(6)
    with changing_draws(lambda mask: mask.copy_(torch.arange(6) < 3)):
        output, mask = torch.native_dropout(x, 0.5, True)
    assert torch.equal(output, x * 2 * (torch.arange(6) < 3))
    assert mask.tolist() == [True] * 3 + [False] * 3


HOOKS = {
    "register_forward_hook": lambda module, args, output: None,
    "register_forward_pre_hook": lambda module, args: None,
    "register_full_backward_hook": lambda module, grad_input, grad_output: None,
    "register_full_backward_pre_hook": lambda module, grad_output: None,
}


@pytest.mark.parametrize("register", HOOKS)
def test_every_kind_of_hook_is_seen(register):
    layer = nn.Conv2d(1, 1, 1)
    assert not has_hooks(layer)
    handle = getattr(layer, register)(HOOKS[register])
    assert has_hooks(layer), f"torch keeps the hooks of {register} elsewhere: name the place in _HOOKS"
    handle.remove()
    assert not has_hooks(layer)


@pytest.mark.parametrize("base", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("part", ["forward", "_conv_forward"])
def test_a_convolution_that_computes_something_else_is_seen(base, part):
    assert hasattr(base, part), f"torch's {base.__name__} has no {part} any more: change _FORWARD_PARTS"
    assert convolves_as(base(2, 2, 1), base)
    assert convolves_as(type("Same", (base,), {})(2, 2, 1), base)
    other = type("Other", (base,), {part: lambda self, *args: args[0]})
    assert not convolves_as(other(2, 2, 1), base)


@pytest.mark.parametrize("base", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_transposed_convolution_that_computes_something_else_is_seen(base):
    assert convolves_as(base(2, 2, 1), base)
    assert not convolves_as(type("Other", (base,), {"forward": lambda self, *args: args[0]})(2, 2, 1), base)


MENDING = "a release of torch has changed this; mend knlightning/internals/torch.py: "


def test_compiled_modules_are_known():
    net = nn.Sequential(nn.Linear(1, 1))
    assert not is_compiled(net), MENDING + "Module._compiled_call_impl is not None before Module.compile()"
    net.compile()
    assert is_compiled(net), MENDING + "Module._compiled_call_impl is None after Module.compile()"
    assert not is_compiled(net[0])


def test_changes_in_place_are_counted():
    x = torch.rand(3)
    before = version_of(x)
    x + 1
    assert version_of(x) == before
    x.detach().mul_(2)
    assert version_of(x) > before, MENDING + "Tensor._version does not grow with a change in place"


class Failing:
    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.act()


def refuse():
    raise ValueError("a damaged file")


@pytest.mark.parametrize(
    ("act", "read"),
    [
        (refuse, worker_message),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), worker_failure),
    ],
)
def test_what_became_of_a_process_is_read_from_the_error(act, read):
    iterator = iter(DataLoader(Failing(act), num_workers=1))
    with pytest.raises((ValueError, RuntimeError)) as error:
        next(iterator)
    advice = f"a DataLoader tells of its processes in another way: correct {read.__name__}"
    assert read(error.value), advice
    assert (worker_message(error.value) == "a damaged file") == (act is refuse), advice
    assert (worker_failure(error.value) is None) == (act is refuse), advice


def test_processes_of_a_loader_are_known():
    advice = "a DataLoader keeps its processes elsewhere: correct workers_of"
    before = {process.pid for process in multiprocessing.active_children()}
    iterator = iter(DataLoader(Failing(lambda: 1), num_workers=2))
    started = {process.pid for process in multiprocessing.active_children()} - before
    assert {worker.pid for worker in workers_of(iterator)} == started, advice
    assert workers_of(iter(DataLoader(Failing(lambda: 1)))) == []


@pytest.mark.parametrize("layer", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(3, 3, 2)])
def test_images_that_are_too_small(layer):
    with pytest.raises(RuntimeError) as error:
        layer(torch.ones(1, 3, 1, 1))
    assert found_too_small(error.value), "torch says in other words that images are too small: correct found_too_small"
    assert not found_too_small(RuntimeError("a bug"))


def test_other_errors_are_not_taken_for_those_of_processes():
    assert worker_message(ValueError("Caught a cold")) is None
    assert worker_failure(RuntimeError("DataLoader is slow")) is None


def test_a_signal_that_is_hidden_by_another_error_is_found():
    """`threading.Thread.start` makes a KeyError of it."""
    error = KeyError("Timer")
    error.__context__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert worker_failure(error) == "A process that reads images has died (number 7 is killed by signal: Killed)."


def test_a_lost_connection_is_told_from_other_errors():
    """As gloo of torch 2.14.1 says it; tests/integration/test_ddp.py has it from real processes."""
    said = "[../third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:16805: Connection reset by peer"
    assert is_loss_of_peer(RuntimeError(said))
    assert is_loss_of_peer(torch.distributed.DistBackendError("NCCL error: remote process exited"))
    assert not is_loss_of_peer(RuntimeError("CUDA out of memory"))
    assert not is_loss_of_peer(ValueError("gloo"))
