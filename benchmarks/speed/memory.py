"""How much memory a side takes at its highest, beyond what the network, the images and the libraries take.

On the CPU in a process of its own, whose memory no earlier side has stretched: ``python -m benchmarks.speed.memory``.
What is read is the kernel's mark of the highest resident size, set back before the run. (`resource.ru_maxrss` would
start at the size of the process that started this one.) On CUDA it is what the caching allocator gave out at most.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from attacks.types import NORMS, Norm
from benchmarks.speed.problems import Problem
from benchmarks.speed.sides import Ours, Side, ours, sides_against

STATUS, SET_BACK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(side: Side | Ours, text: str, problem: Problem, norm: Norm) -> int | None:
    """Bytes that the side needs for these images; None where the system does not tell.

    Args:
        text: the text form of our estimator that the side is, or is held against.

    Raises:
        RuntimeError: the run in the other process failed.
    """
    device = problem.images.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        side.solve(problem, norm)
        return torch.cuda.max_memory_allocated(device) - before
    if not STATUS.exists():
        return None
    name = "" if isinstance(side, Ours) else side.name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.pt"
        torch.save(problem, path)
        command = [sys.executable, "-m", __spec__.name, str(path), text, name, norm, str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"expected the memory of {name or text}, got: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def main(path: str, text: str, name: str, norm: str, threads: str) -> None:
    """Print the bytes that one side needs."""
    torch.set_num_threads(int(threads))
    # written by `peak_bytes` a moment ago
    problem: Problem = torch.load(path, weights_only=False)
    chosen = next(one for one in NORMS if one == norm)
    estimator = ours(text)
    side = next((one for one in sides_against(estimator.estimator.name) if one.name == name), estimator)
    side.solve(problem.first(1), chosen)
    gc.collect()
    with contextlib.suppress(OSError):
        SET_BACK.write_text("5")
    before = _kilobytes("VmRSS")
    side.solve(problem, chosen)
    print(1024 * max(_kilobytes("VmHWM") - before, 0))


def _kilobytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
