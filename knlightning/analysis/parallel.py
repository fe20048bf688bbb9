"""Calls of functions side by side, on this machine or on a cluster, by Ray."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from math import ceil
from threading import BoundedSemaphore, Event
from types import TracebackType
from typing import Any, Self, TypeVar

from knlightning.checks import check, check_number

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIES = 10
"""How many times a call is made again whose worker or node has died."""
RELEASED_AFTER = 60
"""Seconds that a call waits for a directory which another process holds, such as a worker that is about to die."""
STORE = 100 * 2**20
"""Bytes of memory that Ray keeps for objects: calls give and return next to nothing."""


class Pool:
    """Makes calls one after the other in this process, or side by side in worker processes of Ray. A context manager.

    A call whose worker or node dies is made again, on another node if need be, so functions must be able to go on with
    what they have left. Files must be in the same place for all nodes.

    Args:
        parallel: How many calls are made at a time, at least 1. On each machine they share processors and GPUs
            equally; a call gets one GPU at most.
        cluster: Address of a Ray cluster; None for this machine alone, on which Ray is started.

    Attributes:
        parallel: The argument.
        slots: To be held during a call.

    Raises:
        ArgumentError: If parallel is below 1, or Ray is needed and not installed.
    """

    def __init__(self, parallel: int = 1, cluster: str | None = None) -> None:
        check_number("parallel", parallel, at_least=1, integer=True)
        self.parallel, self._cluster = parallel, cluster
        self.slots = BoundedSemaphore(parallel)
        self._ray: Any = None
        self._ended = Event()
        self._threads: list[ThreadPoolExecutor] = []
        if parallel > 1 or cluster is not None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
            check(bool(find_spec("ray")), "parallel", parallel, "1 without Ray", "pip install 'knlightning[cluster]'")
            import ray

            self._ray = ray

    def __enter__(self) -> Self:
        if self._ray:
            options: dict[str, Any] = {"address": self._cluster, "logging_level": "ERROR"}
            if self._cluster is None:
                processors = max(self.parallel, os.cpu_count() or 1)
                options |= {"address": "local", "num_cpus": processors, "object_store_memory": STORE}
            self._ray.init(include_dashboard=False, **options)
            nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            on_each = ceil(self.parallel / max(1, len(nodes)))
            gpus = min((node.get("GPU", 0) for node in nodes), default=0)
            self._remote = self._ray.remote(_call_there).options(
                num_cpus=max(1, min((node["CPU"] for node in nodes), default=1) // on_each),
                num_gpus=1 / ceil(on_each / gpus) if gpus else 0,
                max_retries=RETRIES,
                scheduling_strategy="SPREAD",
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the calls that are still being made. After an interrupt the status is 130."""
        self._ended.set()
        for threads in self._threads:
            threads.shutdown(cancel_futures=True)
        if self._ray:
            self._ray.shutdown()
            if kind is KeyboardInterrupt:
                raise SystemExit(130) from None

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function, in a process of Ray if there is one.

        Args:
            function: One that a process can import.
            args: Its arguments.
        """
        if self._ray is None:
            return function(*args)
        reference = self._remote.remote(os.getcwd(), function, args)
        while not self._ray.wait([reference], timeout=1)[0]:
            if self._ended.is_set():
                self._ray.cancel(reference, force=True)
                raise SystemExit
        try:
            result: Result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # its message is a traceback
            raise error.cause from None
        return result

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield what a function that makes calls returns for each item, in their order.

        Args:
            function: Runs in threads of this process, if calls are made side by side.
            items: What it is given.
        """
        if self._ray is None:
            yield from map(function, items)
            return
        items = list(items)
        threads = ThreadPoolExecutor(max_workers=max(1, min(len(items), self.parallel)))
        self._threads.append(threads)
        yield from (future.result() for future in [threads.submit(function, item) for item in items])


def _call_there(folder: str, function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    """Call a function in a worker process, in the folder of the one that asks for it."""
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.append(folder)
    until = time.monotonic() + RELEASED_AFTER
    while True:
        try:
            return function(*args)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(1)
