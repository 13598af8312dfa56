"""CUDA calls that leave other threads' graph captures alone.

While a thread captures a graph in the mode "global" (torch's default), calls that may allocate or synchronise
fail in every thread that has not relaxed its own mode, and they invalidate the capture.
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__STREAM.html (cuThreadExchangeStreamCaptureMode)
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final

_RELAXED: Final = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED."""


@contextmanager
def undisturbed_capture() -> Iterator[None]:
    """Relax this thread's capture mode for the block. Without a GPU it does nothing."""
    driver = _driver()
    if driver is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    # The mode of before is what comes back in it. An error (no context yet) leaves both as they were.
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@cache
def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None
