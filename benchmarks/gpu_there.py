"""Whether this machine has a GPU that CUDA sees, in words; for `make gpu`, before anything is installed.

Needs nothing but Python: it asks the driver itself. Exit code 1 and a reason if there is none.
"""

from __future__ import annotations

import ctypes
import os
import sys


def gpu_names() -> list[str]:
    """The names of the GPUs. Raises RuntimeError saying why there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"no NVIDIA driver ({error})") from error
    if status := driver.cuInit(0):
        raise RuntimeError(f"the NVIDIA driver does not start (cuInit: error {status}); see nvidia-smi")
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if not count.value:
        raise RuntimeError(f"the NVIDIA driver shows none; CUDA_VISIBLE_DEVICES is {_visible()}")
    return [_name(driver, ordinal) for ordinal in range(count.value)]


def _name(driver: ctypes.CDLL, ordinal: int) -> str:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    driver.cuDeviceGetName(name, len(name), device)
    return name.value.decode(errors="replace")


def _visible() -> str:
    return repr(os.environ.get("CUDA_VISIBLE_DEVICES", "not set"))


def main() -> int:
    """Print the names, or why there is none."""
    try:
        names = gpu_names()
    except RuntimeError as error:
        print(f"no GPU here: {error}", file=sys.stderr)
        return 1
    print(f"{len(names)} GPU{'s' if len(names) > 1 else ''}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
