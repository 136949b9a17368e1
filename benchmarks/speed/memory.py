"""Peak memory of a side beyond that of the network, the images and the libraries.

On the CPU it is measured in a separate process without earlier sides: ``python -m benchmarks.speed.memory``. The value
is the kernel's peak resident size, reset before the run. (`resource.ru_maxrss` would start at the size of the parent
process.) On CUDA it is the peak of the caching allocator.
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
    """Bytes that the side needs for these images; None if the system does not report them.

    Args:
        text: the text form of our estimator that the side is, or is compared with.

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
