"""The engine on Ray: runs tasks on a cluster, or on one that Ray starts on this machine."""

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

# how often Ray retries a task after its worker or machine was lost
RETRIES = 3
# seconds between checks that Ray's own process (raylet) lives; some seconds after its death Ray ends this process
LOOK = 0.5


class OnRay:
    """Runs tasks on Ray, each with a fixed number of CPUs and share of a GPU; lost tasks are run again."""

    parallel = True

    def __init__(
        self, count: int = 0, *, address: str | None = None, gpus: float = 0.0, threads: int | None = None
    ) -> None:
        """Connect to a cluster, or start one on this machine.

        Args:
            count: number of tasks at a time; 0 for as many as fit.
            address: of the cluster; by default ``RAY_ADDRESS``; without either, a cluster is started on this machine.
            gpus: GPUs of each task, such as 0.25; with 0 it measures on CPUs.
            threads: threads and CPUs of each task; by default 1.

        Raises:
            ConfigError: Ray is not installed, there is no cluster at the address, or no machine of it fits a task.
        """
        self._ray = _package()
        self.gpus, self.threads = gpus, threads or 1
        self._asked, self._address = count, address or os.environ.get("RAY_ADDRESS")
        self._connected = False
        self._connect()

    def _connect(self) -> None:
        """Connect, unless connected already; closing another engine may have disconnected this process."""
        ray = self._ray
        if not ray.is_initialized():
            cores = {} if self._address else {"num_cpus": self._asked * self.threads or None}
            try:
                _check_address(self._address or "")
                with _sigterm_restored():
                    ray.init(
                        address=self._address,
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level="ERROR",
                        **cores,
                    )
            except Exception as error:  # Ray raises many types, also plain exceptions
                raise ConfigError(
                    f"expected a Ray cluster at {self._address or 'this machine'}, got {_first_line(error)}; start it, "
                    "or use --engine local"
                ) from None
            self._connected = True
        try:
            room = self._room()
        except ConfigError:
            self.close()
            raise
        self.count = min(self._asked, room) if self._asked else room
        # if the whole cluster is used, as many tasks again are sent ahead with their images
        self._most = 2 * room if self.count == room else self.count
        # max_calls 0: a worker with a GPU is kept for the next task
        needs = {"num_cpus": self.threads, "num_gpus": self.gpus, "max_retries": RETRIES, "max_calls": 0}
        self._work = ray.remote(**needs)(_work)

    def _room(self) -> int:
        """The number of tasks that fit at a time, each on one machine of the cluster.

        Raises:
            ConfigError: none fits.
        """
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        needs = {"CPU": float(self.threads), "GPU": self.gpus}
        room = sum(
            min(int(machine.get(name, 0.0) / needed) for name, needed in needs.items() if needed)
            for machine in machines
        )
        if room:
            return room
        name = next((n for n, needed in needs.items() if max(m.get(n, 0.0) for m in machines) < needed), "GPU")
        most = max(machine.get(name, 0.0) for machine in machines)
        raise ConfigError(
            f"expected a machine of the Ray cluster with {needs[name]:g} {name} for a task, got {most:g}; give "
            f"{'--threads' if name == 'CPU' else '--gpus-per-worker'} less, or use a larger cluster"
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
        """The outcome of a finished task.

        Raises:
            EngineError: Ray lost the task too often.
        """
        errors = self._ray.exceptions
        try:
            outcome = pickle.loads(self._ray.get(reference))
        except errors.RayError as error:
            raise EngineError(
                f"Ray failed at {task} with {type(error).__name__} after {RETRIES} retries: {_first_line(error)}; fix "
                "the cluster, then continue with --resume"
            ) from None
        if isinstance(outcome, Exception):
            raise outcome
        return cast(Outcome, outcome)

    def _is_dead(self) -> bool:
        """Whether the raylet on this machine, if this process started it, has ended."""
        # Ray has no public function for this
        node = getattr(self._ray._private.worker, "_global_node", None)
        started = getattr(node, "all_processes", {}).get("raylet", [])
        return any(info.process.poll() is not None for info in started)

    def _check_alive(self) -> Sequence[Any]:
        """Check that the raylet on this machine lives; returns no finished tasks.

        Raises:
            EngineError: it has ended.
        """
        if self._is_dead():
            raise EngineError("Ray's process on this machine (raylet) was killed or died; continue with --resume")
        return ()

    def close(self) -> None:
        """Disconnect; a cluster that was started here ends."""
        if self._connected and self._ray.is_initialized():
            self._ray.shutdown()
        self._connected = False


def _package() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "expected the package ray for --engine ray, got none; install margin-harness[ray], or use --engine local"
        ) from None
    return ray


def _check_address(address: str) -> None:
    """Check within seconds that a server answers at ``host:port``; Ray itself would try for minutes.

    Raises:
        OSError: none answers.
    """
    host, _, port = address.rpartition(":")
    if host and "://" not in address and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


@contextlib.contextmanager
def _sigterm_restored() -> Iterator[None]:
    """Restore this process's handler of SIGTERM, which Ray replaces."""
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


# all tasks of an epoch have the same network
@lru_cache(maxsize=1)
def _unpacked(network: bytes) -> Packed:
    return Packed(network)
