"""The engine of worker processes: runs tasks in parallel on the cores or GPUs of this machine."""

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

# number of workers that may die at one task, or in a row while starting; more would die of the same cause
DEATHS = 3
# messages of a worker: before its first task, and when it begins a task
READY, BEGUN = "ready", "begun"


class Workers:
    """Runs tasks in worker processes; a killed worker is replaced and its task is run again.

    Each process imports the script that uses this class, so the script's own work must be under
    ``if __name__ == "__main__":``. Each worker has its own pipe and shares no lock, so it may be killed at any time.

    Attributes:
        deaths: number of workers that died.
    """

    parallel = True

    def __init__(self, count: int, *, threads: int | None = None, unit_timeout: float | None = None) -> None:
        """Prepare the engine; processes start with the first task.

        Args:
            count: number of processes, at least 1. With CUDA they use the GPUs in turn, beginning with the model's.
            threads: threads of each process; by default its share of the cores.
            unit_timeout: seconds that a unit may take from the start of its first task. Then its unfinished tasks are
                `Overdue`, and the workers that run them are killed. By default there is no limit.

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
        # an earlier call may have ended before its units did
        self._clocks = UnitClocks(self._clocks.limit)
        try:
            while waiting or self._busy():
                for worker in self._free():
                    if not waiting:
                        break
                    worker.send(waiting.popleft(), network, str(_device(first, worker.number)), settings)
                for worker in self._responding():
                    message = worker.receive()
                    if message is None:
                        task, ready = worker.task, worker.ready
                        self._discard(worker)
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
                    continue  # an outcome counts even if it is read after the limit
                for unit, seconds in self._clocks.late(self._unfinished(waiting)).items():
                    stopped = self._stop(unit) + [task for task in waiting if task.unit == unit]
                    waiting = deque(task for task in waiting if task.unit != unit)
                    yield from ((task, Overdue(seconds)) for task in stopped)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the processes; a later task would start new ones."""
        for worker in list(self._workers.values()):
            worker.kill()
        self._workers.clear()

    def _busy(self) -> list[_Worker]:
        """Workers with a task."""
        return [worker for worker in self._workers.values() if worker.task is not None]

    def _free(self) -> list[_Worker]:
        """Workers without a task; missing workers are started."""
        for number in range(self.count):
            worker = self._workers.get(number)
            if worker is not None and worker.task is None and not worker.process.is_alive():
                self._discard(worker)  # it died while it was idle
            if number not in self._workers:
                self._workers[number] = _Worker(self._context, number)
        return [worker for worker in self._workers.values() if worker.task is None]

    def _unfinished(self, waiting: Iterable[Task]) -> set[Unit]:
        """Units with unfinished tasks."""
        busy = [worker.task.unit for worker in self._busy() if worker.task is not None]
        return {task.unit for task in waiting} | set(busy)

    def _stop(self, unit: Unit) -> list[Task]:
        """Kill the workers that run the unit's tasks; returns these tasks."""
        stopped = []
        for worker in self._busy():
            if worker.task is not None and worker.task.unit == unit:
                stopped.append(worker.task)
                worker.kill()
                del self._workers[worker.number]
        return stopped

    def _responding(self) -> list[_Worker]:
        """Busy workers that have sent a message or died; waits for one, or until a unit's time is over."""
        busy = self._busy()
        sources = [source for worker in busy for source in (worker.pipe, worker.process.sentinel)]
        ready = wait(sources, self._clocks.patience())
        return [worker for worker in busy if worker.pipe in ready or worker.process.sentinel in ready]

    def _discard(self, worker: _Worker) -> None:
        """Remove a dead worker and count it."""
        self.deaths += 1
        worker.kill()
        del self._workers[worker.number]


def _check_deaths(killed: int, unready: int, task: Task) -> None:
    """Give up when one task killed too many workers, or when too many died in a row while starting.

    Raises:
        EngineError: see above.
    """
    if killed >= DEATHS:
        raise EngineError(
            f"{killed} workers died at {task}; if memory ran out, use fewer workers or a smaller batch, then continue "
            "with --resume"
        )
    if unready >= DEATHS:
        raise EngineError(
            f"{unready} workers in a row died while starting; put a script's own work under "
            'if __name__ == "__main__", or measure without workers'
        )


def _device(first: torch.device, number: int) -> torch.device:
    """The device of a worker: the GPUs in turn if the model is on one, else the CPU."""
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
        # only the process holds the other end, so its death is an end of file
        theirs.close()

    def send(self, task: Task, network: Packed, device: str, settings: ProcessSettings) -> None:
        """Send a task, and the network if it differs from the last one sent."""
        self.task, content = task, packed_task(task)
        with contextlib.suppress(OSError):  # the death of a worker is noticed when its pipe is read
            self.pipe.send((device, settings, network is not self._network))
            if network is not self._network:
                self.pipe.send_bytes(network.content)
                self._network = network
            self.pipe.send_bytes(content)

    def receive(self) -> Any:
        """The next message: `READY`, `BEGUN`, an outcome or an exception; None if the process is dead."""
        try:
            if not self.pipe.poll():
                return None
            message = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            return None
        self.ready = True
        return message

    def kill(self) -> None:
        """Kill the process and close the pipe."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection) -> None:
    """Main function of a worker process: run tasks until the pipe or the parent ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_when(lambda: wait([parent.sentinel]))
    protect_output()
    pipe.send_bytes(pickle.dumps(READY))
    network = Packed(b"")
    with contextlib.suppress(EOFError, OSError):
        while True:
            device, settings, new_network = pipe.recv()
            if new_network:
                network = Packed(pipe.recv_bytes())
            outcome = network.answer(pipe.recv_bytes(), device, settings, lambda: pipe.send_bytes(pickle.dumps(BEGUN)))
            pipe.send_bytes(outcome)
