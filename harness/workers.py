"""Tasks in processes of their own, on the cores or GPUs of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from typing import Any

import torch
from torch import nn

from harness.command import end_when, interrupts_ignored, protect_output
from harness.config.devices import device_of
from harness.measuring.clocks import UnitClocks
from harness.measuring.packing import Packed, packed_model, packed_task
from harness.store import Unit
from harness.tasks import EngineError, Outcome, Overdue, ProcessSettings, Task

# workers that one task may kill, and that may die in a row before they are ready: what kills them goes on to
DEATHS = 3
# what a worker says before its first task, and when it begins one
READY, BEGUN = "ready", "begun"


class Workers:
    """Runs tasks in so many processes; when one is killed, another takes its place and its task is run again.

    A script that uses it has its own work under ``if __name__ == "__main__":``, as each process imports it. Each worker
    has a pipe of its own and shares no lock, so that it may be killed at any moment.

    Attributes:
        deaths: how often a worker was lost.
    """

    parallel = True

    def __init__(self, count: int, *, threads: int | None = None, unit_timeout: float | None = None) -> None:
        """Prepare; processes start with the first task.

        Args:
            count: of processes, at least 1; with CUDA they are on the GPUs in turn, from the model's on.
            threads: of each process; by default as many as there are cores for it.
            unit_timeout: seconds that a unit may take from the beginning of its first task; then its tasks that have
                not ended are `Overdue`, and the workers at them are killed. By default no limit.

        Raises:
            EngineError: a count below 1, or a limit that is not above 0.
        """
        if type(count) is not int or count < 1:
            raise EngineError(f"expected at least 1 worker, got {count!r}; give a whole number")
        self.count, self.deaths = count, 0
        self._clocks = UnitClocks(unit_timeout)
        self._threads = threads or max(1, (os.cpu_count() or 1) // count)
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}

    def run(
        self, model: nn.Module, tasks: Sequence[Task], on_progress: Callable[[int], None]
    ) -> Iterator[tuple[Task, Outcome | Overdue]]:
        """See `harness.tasks.Engine`."""
        network, first = Packed(packed_model(model)), device_of(model)
        settings = ProcessSettings.here(self._threads)
        waiting, killed, unready = deque(tasks), Counter[int](), 0
        # an earlier run may have ended before its units did
        self._clocks = UnitClocks(self._clocks.limit)
        try:
            while waiting or self._busy():
                for worker in self._free():
                    if not waiting:
                        break
                    worker.give(waiting.popleft(), network, str(_device(first, worker.number)), settings)
                for worker in self._heard():
                    message = worker.answer()
                    if message is None:
                        task, ready = worker.task, worker.ready
                        self._bury(worker)
                        assert task is not None
                        waiting.appendleft(task)
                        killed[id(task)] += ready
                        unready = 0 if ready else unready + 1
                        _check_deaths(killed[id(task)], unready, task)
                    elif isinstance(message, BaseException):
                        raise message
                    elif isinstance(message, Outcome):
                        task, worker.task, unready = worker.task, None, 0
                        assert task is not None
                        on_progress(len(task.images))
                        yield task, message
                    elif message == BEGUN and worker.task is not None:
                        self._clocks.begin(worker.task.unit)
                if any(worker.pipe.poll() for worker in self._busy()):
                    continue  # what has been answered counts, however late it is read
                for unit, seconds in self._clocks.late(self._unfinished(waiting)).items():
                    stopped = self._stop(unit) + [task for task in waiting if task.unit == unit]
                    waiting = deque(task for task in waiting if task.unit != unit)
                    yield from ((task, Overdue(seconds)) for task in stopped)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes, whatever they do; the next task would start others."""
        for worker in list(self._workers.values()):
            worker.end()
        self._workers.clear()

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker.task is not None]

    def _free(self) -> list[_Worker]:
        """Workers without a task; those that are not there yet are started."""
        for number in range(self.count):
            worker = self._workers.get(number)
            if worker is not None and worker.task is None and not worker.process.is_alive():
                self._bury(worker)  # it died while there was nothing to do
            if number not in self._workers:
                self._workers[number] = _Worker(self._context, number)
        return [worker for worker in self._workers.values() if worker.task is None]

    def _unfinished(self, waiting: Iterable[Task]) -> set[Unit]:
        """Units of which tasks are left."""
        busy = [worker.task.unit for worker in self._busy() if worker.task is not None]
        return {task.unit for task in waiting} | set(busy)

    def _stop(self, unit: Unit) -> list[Task]:
        """Kill the workers that are at the unit; returns their tasks."""
        stopped = []
        for worker in self._busy():
            if worker.task is not None and worker.task.unit == unit:
                stopped.append(worker.task)
                worker.end()
                del self._workers[worker.number]
        return stopped

    def _heard(self) -> list[_Worker]:
        """Busy workers that have said something, or died; waits for one, or for the end of a unit's time."""
        busy = self._busy()
        ready = wait(
            [thing for worker in busy for thing in (worker.pipe, worker.process.sentinel)], self._clocks.patience()
        )
        return [worker for worker in busy if worker.pipe in ready or worker.process.sentinel in ready]

    def _bury(self, worker: _Worker) -> None:
        self.deaths += 1
        worker.end()
        del self._workers[worker.number]


def _check_deaths(killed: int, unready: int, task: Task) -> None:
    if killed >= DEATHS:
        raise EngineError(
            f"expected workers that live, got {killed} deaths at {task}; if memory ran out, take fewer workers or a "
            "smaller batch, then go on with --resume"
        )
    if unready >= DEATHS:
        raise EngineError(
            f"expected workers that start, got {unready} deaths in a row before that; put a script's own work under "
            'if __name__ == "__main__", or measure without workers'
        )


def _device(first: torch.device, number: int) -> torch.device:
    """The GPU of a worker, where the model is on any."""
    if first.type != "cuda":
        return first
    return torch.device("cuda", ((first.index or 0) + number) % torch.cuda.device_count())


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, context: SpawnContext, number: int) -> None:
        self.number, self.ready = number, False
        self.task: Task | None = None
        self._network: Packed | None = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with interrupts_ignored():
            self.process.start()
        # the only other end is the process's own: its death is an end of file
        theirs.close()

    def give(self, task: Task, network: Packed, device: str, settings: ProcessSettings) -> None:
        """Send a task, and the network if it is another one than before."""
        self.task, content = task, packed_task(task)
        with contextlib.suppress(OSError):  # a worker that died is noticed by who listens
            self.pipe.send((device, settings, network is not self._network))
            if network is not self._network:
                self.pipe.send_bytes(network.content)
                self._network = network
            self.pipe.send_bytes(content)

    def answer(self) -> Any:
        """What it says: that it is ready or has begun, an outcome, or an exception; None if it is dead."""
        try:
            if not self.pipe.poll():
                return None
            message = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            return None
        self.ready = True
        return message

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection) -> None:
    """A worker's life: it dies with its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_when(lambda: wait([parent.sentinel]))
    protect_output()
    pipe.send_bytes(pickle.dumps(READY))
    network = Packed(b"")
    with contextlib.suppress(EOFError, OSError):
        while True:
            device, settings, another = pipe.recv()
            if another:
                network = Packed(pipe.recv_bytes())
            answer = network.answer(pipe.recv_bytes(), device, settings, lambda: pipe.send_bytes(pickle.dumps(BEGUN)))
            pipe.send_bytes(answer)
