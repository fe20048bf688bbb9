"""Measure one network in a process of its own, so that peaks of memory do not mix and a process may die alone."""

import math
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from knlightning.analysis.variants import Case, build, count_flops
from knlightning.checks import check

PASSES = ("step", "evaluation")
WARM_UP = 2
MIN_MILLISECONDS = 100.0
"""A pass that is shorter is timed several times over."""
OUT_OF_MEMORY = "out of memory"


Device = Literal["auto", "cpu", "cuda"]


def choose_device(device: Device) -> Device:
    """Check a device, and choose one for "auto": a GPU if there is one.

    Returns:
        "cpu" or "cuda".

    Raises:
        ArgumentError: If it is "cuda" and torch finds no GPU.
    """
    there = torch.cuda.is_available()
    check(device != "cuda" or there, "device", device, "cpu or auto", "torch finds no GPU here")
    if device == "auto":
        return "cuda" if there else "cpu"
    return device


def bytes_kept(net: nn.Module, images: Tensor) -> int:
    """Count the bytes of the distinct storages that a forward pass leaves in memory for the backward pass.

    They are those of the images and of what is made of them, without the parameters, whoever holds them.

    Args:
        net: The network, in the mode that is wanted.
        images: Its input.
    """
    made = _Storages(images)
    with made:
        graph = net(images).grad_fn  # the output itself goes, unless it is kept
    parameters = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept = {address: size for address, (storage, size) in made.found.items() if not storage.expired()}
    del graph
    return sum(size for address, size in kept.items() if address not in parameters)


class _Storages(TorchDispatchMode):
    """Look at the storages of the results of all operations, without holding them."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}
        self._look(images)

    def _look(self, value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            self.found[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._look(value)
        return result


def largest_map(net: nn.Module, images: Tensor) -> int:
    """Return the bytes of the largest output of a layer, in evaluation."""
    largest = 0

    def compare(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.nbytes)

    handles = [module.register_forward_hook(compare) for module in net.modules()]
    net.eval()
    with torch.inference_mode():
        net(images)
    for handle in handles:
        handle.remove()
    return largest


class Probe:
    """A network with its data, and the passes that are timed.

    A training step is forward pass, cross-entropy, backward pass and SGD with momentum, as in the paper. The images
    are random numbers.

    Args:
        case: The network.
        device: "cpu" or "cuda".
        channels_last: Memory format of images and weights.
    """

    def __init__(self, case: Case, device: str, channels_last: bool) -> None:
        self.device = device
        nn.Conv2d(1, 1, 1, device=device)(torch.zeros(1, 1, 1, 1, device=device)).sum().backward()  # loads libraries
        self.before = 0 if device == "cuda" else self._peak()
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.images = torch.rand(case.shape, device=device).contiguous(memory_format=layout)
        self.whole = self.images
        if case.evaluation_shape != case.shape:
            self.whole = torch.rand(case.evaluation_shape, device=device).contiguous(memory_format=layout)
        self.net = build(case).to(device, memory_format=layout)  # type: ignore[call-overload] # torch's stub lacks it
        labels = (case.batch_size, *case.shape[2:]) if case.segmentation else (case.batch_size,)
        self.run = torch.compile(self.net) if case.compiled else self.net
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=case.precision == "bfloat16")
        self.labels = torch.randint(19 if case.segmentation else 100, labels, device=device)
        # The learning rate is 0: nothing diverges, and the time is the same.
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.0, momentum=0.9)
        self.repeats = dict.fromkeys(PASSES, 1)

    def costs(self) -> dict[str, float]:
        """Warm up, and measure all but the time.

        Returns:
            "step_peak" and "evaluation_peak", the most bytes in use, on a GPU those allocated, on a CPU the growth of
            the process's resident set since before the network was built, which for a step is at least that of the
            evaluation; "evaluation_maps", the peak of the evaluation without the weights, in units of the largest
            output of a layer; "kept", see `bytes_kept`; "flops", see
            `knlightning.analysis.variants.count_flops`.
        """
        peaks: dict[str, float] = {}
        for which in PASSES[::-1]:  # a step needs more memory than an evaluation: the later peak is its own
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(WARM_UP):
                milliseconds = self.milliseconds(which)
            peaks[f"{which}_peak"] = self._peak() - self.before
            self.repeats[which] = math.ceil(MIN_MILLISECONDS / milliseconds)
        weights = sum(parameter.nbytes for parameter in self.net.parameters())
        with self.autocast:
            peaks["evaluation_maps"] = (peaks["evaluation_peak"] - weights) / largest_map(self.net, self.whole)
            self.net.train()
            return peaks | {"kept": bytes_kept(self.net, self.images), "flops": count_flops(self.net, self.images)}

    def milliseconds(self, which: str) -> float:
        """Time one of the passes, in milliseconds."""
        self.net.train(which == "step")
        run = self._step if which == "step" else self._evaluate
        if self.device == "cuda":
            run()  # takes the memory again that was given back below
        self._synchronize()
        start = time.perf_counter()
        for _ in range(self.repeats[which]):
            run()
        self._synchronize()
        elapsed = time.perf_counter() - start
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the networks that it is compared with need the memory now
        return 1e3 * elapsed / self.repeats[which]

    def _step(self) -> None:
        self.optimizer.zero_grad()
        with self.autocast:
            loss = F.cross_entropy(self.run(self.images), self.labels)
        loss.backward()
        self.optimizer.step()

    @torch.inference_mode()
    def _evaluate(self) -> None:
        with self.autocast:
            self.run(self.whole)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def ran_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception means that memory ran out, on a GPU or a CPU."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    in_text = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    return in_text or isinstance(error, MemoryError | torch.OutOfMemoryError)


_probe: Probe


def start(case: Case, device: str, channels_last: bool) -> dict[str, float]:
    """Make the probe of this process, and return its costs."""
    global _probe
    _probe = Probe(case, device, channels_last)
    return _probe.costs()


def milliseconds(which: str) -> float:
    """Time a pass of this process's probe."""
    return _probe.milliseconds(which)


class Worker:
    """A process that measures, seen from outside.

    `status` is "ok", or says why there are no more answers.
    """

    def __init__(self) -> None:
        self.status = "ok"
        # Forked from a process that has imported torch but not used it: starts at once, even beside a GPU in use. A
        # worker imports the main module again: what that imports is to be there already.
        context = multiprocessing.get_context("forkserver")
        imported = {"jsonargparse", "lightning.pytorch.cli", "matplotlib.figure", "rich.table"} & sys.modules.keys()
        context.set_forkserver_preload([__name__, *imported])
        # Ctrl-C is the caller's
        self._pool = ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in the process; None if memory has run out there, now or before.

        Raises:
            Exception: If the function raises another one.
        """
        if self.status != "ok":
            return None
        try:
            return self._pool.submit(function, *args).result()
        except BrokenProcessPool:
            self.status = f"killed: {OUT_OF_MEMORY}?"
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            self.status = OUT_OF_MEMORY
        self.close()
        return None

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()
