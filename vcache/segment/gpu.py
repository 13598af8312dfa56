"""What segments need of CUDA: cupy's binding, GPUs by UUID, a thread in which calls disturb nobody."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

from vcache.errors import SegmentError

_Result = TypeVar("_Result")

_STREAM_CAPTURE_MODE_RELAXED = 2


def cuda_runtime() -> ModuleType:
    """cupy's binding of the CUDA runtime. SegmentError, with what to do, without cupy or a visible GPU."""
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise SegmentError(
            f"cuda segments need cupy ({error}): install vcache[cuda12] or vcache[cuda13]"
        ) from error
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise SegmentError(f"no GPU visible: {error}; {_visibility()}") from error
    if count == 0:
        raise SegmentError(f"no GPU visible; {_visibility()}")
    return runtime  # type: ignore[no-any-return]  # cupy is untyped


def _visibility() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = "is not set" if visible is None else f"is {visible!r}"
    return f"CUDA_VISIBLE_DEVICES {named}; see nvidia-smi, and in a container start it with --gpus"


def device_count() -> int:
    """How many GPUs this process sees, at least one. Raises SegmentError as `cuda_runtime` does."""
    return int(cuda_runtime().getDeviceCount())


def gpu_uuid(ordinal: int) -> str:
    """The UUID of the GPU `ordinal`, as nvidia-smi -L prints it: "GPU-", then 8-4-4-4-12 hex digits.

    From the driver: cupy's getDeviceProperties gives it as a C string, which ends at the first zero byte.
    """
    raw = (ctypes.c_ubyte * 16)()
    device = ctypes.c_int()
    driver = _driver()
    _check(driver.cuInit(0), "cuInit")
    _check(driver.cuDeviceGet(ctypes.byref(device), ordinal), f"cuDeviceGet({ordinal})")
    # _v2 gives a MIG instance its own UUID; drivers before CUDA 11.4 have only the first form.
    ask = getattr(driver, "cuDeviceGetUuid_v2", None) or driver.cuDeviceGetUuid
    _check(ask(ctypes.byref(raw), device), "cuDeviceGetUuid")
    digits = bytes(raw).hex()
    return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SegmentError(f"no NVIDIA driver: {error}; {_visibility()}") from error


def _check(status: int, call: str) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise SegmentError(f"{call}: CUDA error {status} ({(text.value or b'unknown').decode()})")


def on_device(ordinal: int, work: Callable[[ModuleType], _Result]) -> _Result:
    """Run `work(runtime)` with a GPU current, in a thread of its own; CUDA's errors become SegmentError.

    In its own, because both the current device and the capture mode are a thread's: nothing has to be put
    back (putting back a device that has no context yet would make one, of hundreds of MB), and with the
    capture mode relaxed a graph that another thread captures is not invalidated.
    """
    runtime = cuda_runtime()
    results: list[_Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            _relax_capture()
            runtime.setDevice(ordinal)
            results.append(work(runtime))
        except BaseException as error:  # raised again below, in the caller's thread
            failures.append(error)

    thread = threading.Thread(target=run, name="vcache-cuda")
    thread.start()
    thread.join()
    if not failures:
        return results[0]
    if isinstance(failures[0], runtime.CUDARuntimeError):
        raise SegmentError(f"on cuda:{ordinal}: {failures[0]}") from failures[0]
    raise failures[0]


def _relax_capture() -> None:
    mode = ctypes.c_int(_STREAM_CAPTURE_MODE_RELAXED)
    driver = _driver()
    _check(driver.cuInit(0), "cuInit")
    _check(driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")


def copy_out(runtime: ModuleType, address: int, length: int) -> bytes:
    """Some bytes of GPU memory, for headers. Called inside `on_device`."""
    host = ctypes.create_string_buffer(length)
    _copy(runtime, ctypes.addressof(host), address, length)
    return host.raw


def copy_in(runtime: ModuleType, address: int, content: bytes) -> None:
    """Overwrite some bytes of GPU memory, for headers. Called inside `on_device`."""
    host = ctypes.create_string_buffer(content, len(content))
    _copy(runtime, address, ctypes.addressof(host), len(content))


def _copy(runtime: ModuleType, to: int, source: int, length: int) -> None:
    # A stream of its own: the legacy default stream would wait for, and break, a capture.
    stream = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
    try:
        runtime.memcpyAsync(to, source, length, runtime.memcpyDefault, stream)
        runtime.streamSynchronize(stream)
    finally:
        runtime.streamDestroy(stream)
