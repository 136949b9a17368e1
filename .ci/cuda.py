"""End with one line and status 1 where no CUDA device can be used; `tox -e gpu` runs this first.

It asks the driver, so that a missing GPU is known before several gigabytes are installed. With `--torch`
it asks torch as well, whose build may be one for CPUs or for another driver.
"""

import ctypes
import os
import sys


def driver_problem() -> str | None:
    """Why the driver gives no device, or None."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"the NVIDIA driver is missing ({library} cannot be loaded)"
    # cuInit fails with error 100 where CUDA_VISIBLE_DEVICES hides every device
    if error := driver.cuInit(0):
        return f"the NVIDIA driver offers no device (cuInit: error {error})"
    count = ctypes.c_int(0)
    if error := driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver does not answer (cuDeviceGetCount: error {error})"
    return None if count.value > 0 else "the NVIDIA driver lists no device"


def torch_problem() -> str | None:
    """Why torch cannot use the device, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} (built for CUDA: {torch.version.cuda}) cannot use this machine's GPU"


if __name__ == "__main__":
    problem = driver_problem()
    if problem is None and "--torch" in sys.argv[1:]:
        problem = torch_problem()
    if problem is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        setting = "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible!r}"
        sys.exit(f"No CUDA device: {problem}{setting}. The tests marked gpu need one.")
