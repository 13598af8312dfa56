"""What segments need of CUDA: GPUs by UUID, a thread in which calls disturb nobody, cupy's binding.

UUIDs come from the driver itself, by ctypes, so that they are known whatever packages are installed.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

from vcache.errors import ArgumentError, SegmentError
from vcache.segment.cuda_errors import Facts, Way
from vcache.segment.header import parse_device

_Result = TypeVar("_Result")

_STREAM_CAPTURE_MODE_RELAXED = 2


# -- identity


def device_count() -> int:
    """How many GPUs this process sees, at least one. Raises SegmentError, with what to do, if none."""
    count = ctypes.c_int()
    _check(_driver().cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    if count.value == 0:
        raise SegmentError(f"no GPU visible; {_visibility()}")
    return count.value


def gpu_uuid(ordinal: int) -> str:
    """The UUID of GPU `ordinal` of this process, as nvidia-smi -L prints it: "GPU-" or, of a MIG instance,
    "MIG-", then 8-4-4-4-12 hex digits. Raises SegmentError.

    From the driver: cupy's getDeviceProperties gives it as a C string, which ends at the first zero byte.
    """
    driver = _driver()
    count = device_count()
    if ordinal >= count:
        raise SegmentError(f"there is no cuda:{ordinal}: this process sees {count} GPUs; {_visibility()}")
    device = ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(device), ordinal), f"cuDeviceGet({ordinal})")
    whole = _read_uuid(driver.cuDeviceGetUuid, device)
    # _v2 gives a MIG instance its own UUID; drivers before CUDA 11.4 have only the first form.
    newer = getattr(driver, "cuDeviceGetUuid_v2", None)
    return uuid_text(whole, whole if newer is None else _read_uuid(newer, device))


def uuid_text(whole: bytes, part: bytes) -> str:
    """A GPU's name from the 16 bytes of the whole GPU and those of the part of it that a process sees."""
    digits = part.hex()
    groups = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return ("GPU-" if part == whole else "MIG-") + "-".join(groups)


def device_label(device: str, uuid_of: Callable[[int], str] = gpu_uuid) -> str:
    """The label by which all processes of the machine know a device: "cuda:1" becomes "cuda:GPU-…".

    "shm:1" is one already. uuid_of: as `gpu_uuid`. Raises ArgumentError, and SegmentError without that GPU.
    """
    kind, number = parse_device(device)
    return device if kind == "shm" else f"cuda:{uuid_of(number)}"


def own_ordinal(own_device: str | None) -> int:
    """The number of the importer's own GPU; None: torch's current one. Raises ArgumentError."""
    if own_device is None:
        import torch

        return torch.cuda.current_device() if torch.cuda.is_available() else 0
    kind, ordinal = parse_device(own_device)
    if kind != "cuda" or ordinal >= device_count():
        raise ArgumentError("own_device", own_device, 'a GPU that this process sees, such as "cuda:0"')
    return ordinal


def facts_of(way: Way, ordinal: int, memory_on: str = "") -> Facts:
    """What can be found out for `cuda_errors.advice`, with GPU `ordinal` current; never raises."""
    try:
        seen = tuple(map(gpu_uuid, range(device_count())))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        if _driver().cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) != 0:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
        return Facts(
            way,
            own=seen[ordinal],
            memory_on=memory_on,
            seen=seen,
            peer_access=_peer_access(ordinal, seen.index(memory_on)) if memory_on in seen else None,
            free_bytes=free.value,
            total_bytes=total.value,
        )
    except (SegmentError, IndexError):
        return Facts(way, memory_on=memory_on)


def _peer_access(ordinal: int, peer: int) -> bool | None:
    if ordinal == peer:
        return True
    can = ctypes.c_int()
    # A CUdevice is the device's number: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DEVICE.html
    failed = _driver().cuDeviceCanAccessPeer(ctypes.byref(can), ctypes.c_int(ordinal), ctypes.c_int(peer))
    return None if failed else bool(can.value)


def _read_uuid(ask: Callable[..., int], device: ctypes.c_int) -> bytes:
    raw = (ctypes.c_ubyte * 16)()
    _check(ask(ctypes.byref(raw), device), "cuDeviceGetUuid")
    return bytes(raw)


def _visibility() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = "is not set" if visible is None else f"is {visible!r}"
    return f"CUDA_VISIBLE_DEVICES {named}; see nvidia-smi, and in a container start it with --gpus"


def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SegmentError(f"no NVIDIA driver: {error}; {_visibility()}") from error
    if failed := driver.cuInit(0):
        raise SegmentError(f"no GPU visible: cuInit: {_described(driver, failed)}; {_visibility()}")
    return driver


def _check(status: int, call: str) -> None:
    if status != 0:
        raise SegmentError(f"{call}: {_described(_driver(), status)}")


def _described(driver: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(status, ctypes.byref(text))
    return f"CUDA error {status} ({(text.value or b'unknown').decode()})"


# -- calls


def in_own_thread(enter: Callable[[], object], work: Callable[[], _Result]) -> _Result:
    """Run `enter`, which makes a GPU current, and then `work` in a thread of their own, whose capture mode is
    relaxed; what they raise is raised here.

    In its own, because both the current device and the capture mode are a thread's: nothing has to be put
    back (putting back a device that has no context yet would make one, of hundreds of MB), and with the
    capture mode relaxed a graph that another thread captures is not invalidated.
    """
    results: list[_Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            driver = _driver()
            _relax_capture(driver)  # as far as that goes without a context: it counts again below
            enter()
            _check(_relax_capture(driver), "cuThreadExchangeStreamCaptureMode")
            results.append(work())
        except BaseException as error:  # raised again below, in the caller's thread
            failures.append(error)

    thread = threading.Thread(target=run, name="vcache-cuda")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _relax_capture(driver: ctypes.CDLL) -> int:
    mode = ctypes.c_int(_STREAM_CAPTURE_MODE_RELAXED)
    return int(driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))


def cuda_runtime() -> ModuleType:
    """cupy's binding of the CUDA runtime. SegmentError, with what to do, without cupy or a visible GPU."""
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise SegmentError(
            f"legacy CUDA IPC needs cupy ({error}): install vcache[cuda12] or vcache[cuda13]"
        ) from error
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise SegmentError(f"no GPU visible: {error}; {_visibility()}") from error
    if count == 0:
        raise SegmentError(f"no GPU visible; {_visibility()}")
    return runtime  # type: ignore[no-any-return]  # cupy is untyped
