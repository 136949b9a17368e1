"""Tasks in processes of their own, on the cores or GPUs of this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch
from torch import nn

from harness.devices import device_of
from harness.packing import measured, packed_model, packed_task
from harness.tasks import EngineError, Outcome, ProcessSettings, Task

# deaths of workers after each of which nothing was finished: what kills them will go on to
DEATHS = 3


class Workers:
    """Runs tasks in so many processes; when one is killed, what was running is run again.

    A script that uses it has its own work under ``if __name__ == "__main__":``, as each process imports it.

    Attributes:
        deaths: how often workers were lost.
    """

    parallel = True

    def __init__(self, count: int, *, threads: int | None = None) -> None:
        """Prepare; processes start with the first task.

        Args:
            count: of processes, at least 1; with CUDA they share the GPUs in turn.
            threads: of each process; by default as many as there are cores for it.

        Raises:
            EngineError: a count below 1.
        """
        if count < 1:
            raise EngineError(f"expected at least 1 worker, got {count}; give a larger number")
        self.count, self.deaths = count, 0
        self._threads = threads or max(1, (os.cpu_count() or 1) // count)
        self._context = multiprocessing.get_context("spawn")
        self._pool: ProcessPoolExecutor | None = None
        self._over = self._context.Event()

    def run(
        self, model: nn.Module, tasks: Sequence[Task], on_progress: Callable[[int], None]
    ) -> Iterator[tuple[Task, Outcome]]:
        """See `harness.tasks.Engine`."""
        device, network = device_of(model), packed_model(model)
        settings = ProcessSettings.here(self._threads)
        waiting, running = deque(tasks), dict[Future[bytes], tuple[Task, int]]()
        slots, in_vain = list(range(self.count)), 0
        try:
            while waiting or running:
                while waiting and slots:
                    slot = slots.pop()
                    future = self._submit(network, packed_task(waiting[0]), str(_of_slot(device, slot)), settings)
                    running[future] = waiting.popleft(), slot
                lost = []
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task, slot = running.pop(future)
                    slots.append(slot)
                    if isinstance(future.exception(), BrokenProcessPool):
                        lost.append(task)
                        continue
                    in_vain = 0
                    on_progress(len(task.images))
                    yield task, pickle.loads(future.result())
                if lost:
                    # a pool that lost one process has given up all
                    lost += [task for task, _ in running.values()]
                    running, slots, in_vain = {}, list(range(self.count)), in_vain + 1
                    waiting.extendleft(lost)
                    self.deaths += 1
                    self._pool = None
                    if in_vain >= DEATHS:
                        raise EngineError(
                            f"expected workers that live, got {in_vain} deaths in a row at {lost[0]}; if memory ran "
                            "out, take fewer workers or a smaller batch, then go on with --resume"
                        )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes, whatever they do."""
        if self._pool is not None:
            self._over.set()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            self._over = self._context.Event()

    def _submit(self, network: bytes, task: bytes, device: str, settings: ProcessSettings) -> Future[bytes]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.count, self._context, _begin, (self._over,))
        try:
            return self._pool.submit(_work, network, task, device, settings)
        except BrokenProcessPool as error:  # one died while there was nothing to do
            failed: Future[bytes] = Future()
            failed.set_exception(error)
            return failed


def _of_slot(device: torch.device, slot: int) -> torch.device:
    """The GPU of a worker, where the model is on any."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", slot % torch.cuda.device_count())


def _begin(over: Any) -> None:
    """Make a process a worker: it leaves Ctrl-C to its parent, and dies with it, or when it is told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        while not over.is_set() and not wait_for([parent.sentinel], timeout=0.2):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(network: bytes, task: bytes, device: str, settings: ProcessSettings) -> bytes:
    return pickle.dumps(measured(network, task, device, settings))
