"""Tasks on a Ray cluster, or on one that Ray starts on this machine."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

from torch import nn

from harness.config.options import ConfigError
from harness.measuring.packing import Packed, packed_model, packed_task
from harness.tasks import EngineError, Outcome, ProcessSettings, Task

# how often Ray starts a task again whose worker or machine was lost
RETRIES = 3
# seconds between looks at whether Ray's own process on this machine lives: without it Ray soon ends this one
LOOK = 0.5


class OnRay:
    """Runs tasks on Ray, each with so many CPUs and so much of a GPU; lost ones are run again."""

    parallel = True

    def __init__(
        self, count: int = 0, *, address: str | None = None, gpus: float = 0.0, threads: int | None = None
    ) -> None:
        """Connect to a cluster, or start one here.

        Args:
            count: of tasks at a time; 0 for as many as there is room for.
            address: of the cluster; by default what ``RAY_ADDRESS`` says, else one is started on this machine.
            gpus: for each task, such as 0.25; 0 measures on CPUs.
            threads: of each task, and its CPUs; by default 1.

        Raises:
            ConfigError: Ray is not installed, no cluster is at the address, or it has not what a task needs.
        """
        self._ray = _package()
        self.gpus, self.threads = gpus, threads or 1
        self._asked, self._address = count, address or os.environ.get("RAY_ADDRESS")
        self._own = False
        self._connect()

    def _connect(self) -> None:
        """Be connected, which another engine's end may have undone."""
        ray = self._ray
        if not ray.is_initialized():
            cores = {} if self._address else {"num_cpus": self._asked * self.threads or None}
            try:
                _knock(self._address or "")
                with _own_signals():
                    ray.init(
                        address=self._address,
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level="ERROR",
                        **cores,
                    )
            except Exception as error:  # Ray raises many kinds, bare ones too
                raise ConfigError(
                    f"expected a Ray cluster at {self._address or 'this machine'}, got {_first_line(error)}; start it, "
                    "or take --engine local"
                ) from None
            self._own = True
        try:
            room = self._room()
        except ConfigError:
            self.close()
            raise
        self.count = min(self._asked, room) if self._asked else room
        # where all that there is room for is used, as many more wait with their images
        self._most = 2 * room if self.count == room else self.count
        # a worker that had a GPU goes on to the next task
        needs = {"num_cpus": self.threads, "num_gpus": self.gpus, "max_retries": RETRIES, "max_calls": 0}
        self._work = ray.remote(**needs)(_work)

    def _room(self) -> int:
        """How many tasks there is room for at a time, each on one machine of the cluster."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        needs = {"CPU": float(self.threads), "GPU": self.gpus}
        room = sum(
            min(int(one.get(name, 0.0) / needed) for name, needed in needs.items() if needed) for one in machines
        )
        if room:
            return room
        name = next((n for n, needed in needs.items() if max(m.get(n, 0.0) for m in machines) < needed), "GPU")
        most = max(machine.get(name, 0.0) for machine in machines)
        raise ConfigError(
            f"expected a machine of the Ray cluster with {needs[name]:g} {name} for a task, got {most:g}; give "
            f"{'--threads' if name == 'CPU' else '--gpus-per-worker'} less, or take a larger cluster"
        )

    def run(
        self, model: nn.Module, tasks: Sequence[Task], on_progress: Callable[[int], None]
    ) -> Iterator[tuple[Task, Outcome]]:
        """See `harness.tasks.Engine`."""
        self._connect()
        ray, settings = self._ray, ProcessSettings.here(self.threads)
        dumps = ray.cloudpickle.dumps
        network = ray.put(packed_model(model, dumps))
        waiting, running = deque(tasks), dict[Any, Task]()
        try:
            while waiting or running:
                while waiting and len(running) < self._most:
                    task = waiting.popleft()
                    running[self._work.remote(network, packed_task(task, dumps), self.gpus > 0, settings)] = task
                for done in ray.wait(list(running), num_returns=1, timeout=LOOK)[0] or self._check_alive():
                    task = running.pop(done)
                    outcome = self._outcome(done, task)
                    on_progress(len(task.images))
                    yield task, outcome
        finally:
            for reference in running if not self._is_dead() else ():
                ray.cancel(reference, force=True)

    def _outcome(self, reference: Any, task: Task) -> Outcome:
        errors = self._ray.exceptions
        try:
            found = pickle.loads(self._ray.get(reference))
        except errors.RayError as error:
            raise EngineError(
                f"expected {task} from Ray, got {type(error).__name__} after {RETRIES} more tries: "
                f"{_first_line(error)}; mend the cluster, then go on with --resume"
            ) from None
        if isinstance(found, Exception):
            raise found
        return cast(Outcome, found)

    def _is_dead(self) -> bool:
        """Whether Ray's process on this machine, if this one started it, has ended."""
        # Ray says so in no public way
        node = getattr(self._ray._private.worker, "_global_node", None)
        started = getattr(node, "all_processes", {}).get("raylet", [])
        return any(one.process.poll() is not None for one in started)

    def _check_alive(self) -> Sequence[Any]:
        """No task that is done.

        Raises:
            EngineError: Ray's process on this machine has ended.
        """
        if self._is_dead():
            raise EngineError("Ray's process on this machine (raylet) was killed or died; go on with --resume")
        return ()

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._own and self._ray.is_initialized():
            self._ray.shutdown()
        self._own = False


def _package() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "expected the package ray for --engine ray, got none; install margin-harness[ray], or take --engine local"
        ) from None
    return ray


def _knock(address: str) -> None:
    """Find out in seconds that nobody is at ``host:port``: Ray itself tries for minutes.

    Raises:
        OSError: nobody is.
    """
    host, _, port = address.rpartition(":")
    if host and "://" not in address and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Put back what SIGTERM does here, which Ray takes for itself."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _work(network: bytes, task: bytes, gpu: bool, settings: ProcessSettings) -> bytes:
    return _unpacked(network).answer(task, "cuda" if gpu else "cpu", settings)


# an epoch has one network, and many tasks
@lru_cache(maxsize=1)
def _unpacked(network: bytes) -> Packed:
    return Packed(network)
