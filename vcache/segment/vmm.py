"""GPU memory by virtual memory management: allocated, exported as a POSIX file descriptor, mapped by address.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html, with cuda-python's binding of the driver.
The descriptor travels like a memfd, also between PID namespaces. Memory stays until the last mapping and the
last descriptor of it are gone, so its holder may let go of it before its importers do.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, TypeVar

from vcache.errors import ArgumentError, RemoteProtocolError, SegmentError
from vcache.segment.cuda_errors import Step, Way, in_words
from vcache.segment.gpu import facts_of, in_own_thread
from vcache.segment.header import SegmentDescriptor
from vcache.segment.region import Region

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class _Calls:
    """The driver's functions with one GPU current; what they refuse is a SegmentError in words."""

    def __init__(self, driver: ModuleType, ordinal: int, memory_on: str = "") -> None:
        self.driver = driver
        self.ordinal = ordinal
        self._memory_on = memory_on

    def __call__(self, step: Step, function: Callable[..., tuple[Any, ...]], *arguments: object) -> Any:
        """What the function returns beside its status."""
        status, *results = function(*arguments)
        if status != self.driver.CUresult.CUDA_SUCCESS:
            facts = facts_of(Way.FD, self.ordinal, self._memory_on)
            raise SegmentError(in_words(step, function.__name__, int(status), status.name, facts))
        return results[0] if results else None


class _VmmRegion(Region):
    """A mapping of memory that this process allocated or imported."""

    def __init__(self, address: int, size: int, lies_on: int, *, ordinal: int, writable: bool) -> None:
        super().__init__(address, size, lies_on, writable=writable)
        self._ordinal = ordinal

    def read(self, offset: int, length: int) -> bytes:
        host = ctypes.create_string_buffer(length)

        def copy(calls: _Calls, stream: object) -> None:
            source = self.address + offset
            calls(Step.COPY, calls.driver.cuMemcpyDtoHAsync, ctypes.addressof(host), source, length, stream)

        self._copy(copy)
        return host.raw

    def write(self, offset: int, content: bytes) -> None:
        host = ctypes.create_string_buffer(content, len(content))

        def copy(calls: _Calls, stream: object) -> None:
            to, length = self.address + offset, len(content)
            calls(Step.COPY, calls.driver.cuMemcpyHtoDAsync, to, ctypes.addressof(host), length, stream)

        self._copy(copy)

    def _copy(self, copy: Callable[[_Calls, object], None]) -> None:
        def work(calls: _Calls) -> None:
            # A stream of its own: the legacy default stream would wait for, and break, a capture.
            flags = int(calls.driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            stream = calls(Step.COPY, calls.driver.cuStreamCreate, flags)
            try:
                copy(calls, stream)
                calls(Step.COPY, calls.driver.cuStreamSynchronize, stream)
            finally:
                calls(Step.COPY, calls.driver.cuStreamDestroy, stream)

        _on_gpu(self._ordinal, "", work)

    def release(self) -> None:
        def work(calls: _Calls) -> None:
            calls(Step.FREE, calls.driver.cuMemUnmap, self.address, self.size)
            calls(Step.FREE, calls.driver.cuMemAddressFree, self.address, self.size)

        _on_gpu(self._ordinal, "", work)


def allocate(ordinal: int, size: int) -> tuple[Region, bytes, int]:
    """`size` bytes on GPU `ordinal`, no handle, and the file descriptor, which is the caller's to close.

    Raises ArgumentError if the GPU allocates in other multiples, SegmentError.
    """

    def work(calls: _Calls) -> tuple[Region, bytes, int]:
        driver = calls.driver
        _check_supported(calls)
        properties = _properties(driver, ordinal)
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = calls(Step.ALLOCATE, driver.cuMemGetAllocationGranularity, properties, least)
        if size % granularity:
            raise ArgumentError("size", size, f"a multiple of {granularity} (bytes) on this GPU")
        with _released(calls, calls(Step.ALLOCATE, driver.cuMemCreate, size, properties, 0)) as handle:
            fd = int(calls(Step.EXPORT, driver.cuMemExportToShareableHandle, handle, _fd_type(driver), 0))
            try:
                os.set_inheritable(fd, False)  # a child with it would keep the memory
                return _mapped(calls, handle, size, writable=True), b"", fd
            except BaseException:
                os.close(fd)
                raise

    return _on_gpu(ordinal, "", work)


def open_peer(descriptor: SegmentDescriptor, fd: int | None, ordinal: int, *, writable: bool) -> Region:
    """A peer's memory, mapped for GPU `ordinal` alone; `fd` stays the caller's. No context on the peer's GPU.

    writable=False: read-only if the driver can; `Region.writable` says what it became. Raises SegmentError,
    and RemoteProtocolError without a descriptor.
    """
    if fd is None:
        raise RemoteProtocolError(f"segment {descriptor.segment_id.hex()} came without a file descriptor")

    def work(calls: _Calls) -> Region:
        driver = calls.driver
        imported = calls(Step.IMPORT, driver.cuMemImportFromShareableHandle, fd, _fd_type(driver))
        with _released(calls, imported) as handle:
            return _mapped(calls, handle, descriptor.size, writable=writable)

    return _on_gpu(ordinal, descriptor.gpu, work)


def _check_supported(calls: _Calls) -> None:
    driver = calls.driver
    names = driver.CUdevice_attribute
    device = calls(Step.ENTER, driver.cuDeviceGet, calls.ordinal)
    for attribute, what in (
        (names.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "virtual memory management"),
        (names.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, "memory by file descriptor"),
    ):
        if not calls(Step.ENTER, driver.cuDeviceGetAttribute, attribute, device):
            raise SegmentError(f"this GPU or its driver has no {what}")


def _properties(driver: ModuleType, ordinal: int) -> Any:
    """Plain GPU memory that can be exported as a file descriptor."""
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = ordinal
    properties.requestedHandleTypes = _fd_type(driver)
    return properties


def _fd_type(driver: ModuleType) -> Any:
    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


@contextmanager
def _released(calls: _Calls, handle: Any) -> Iterator[Any]:
    """Let go of an allocation's handle after the block: mapping and descriptor keep the memory without it."""
    try:
        yield handle
    finally:
        calls(Step.FREE, calls.driver.cuMemRelease, handle)


def _mapped(calls: _Calls, handle: Any, size: int, *, writable: bool) -> Region:
    """The memory at an address of this process, to be used by the current GPU."""
    driver = calls.driver
    with ExitStack() as undo:
        address = int(calls(Step.MAP, driver.cuMemAddressReserve, size, 0, 0, 0))
        undo.callback(driver.cuMemAddressFree, address, size)
        calls(Step.MAP, driver.cuMemMap, address, size, 0, handle, 0)
        undo.callback(driver.cuMemUnmap, address, size)
        became_writable = _grant_access(calls, address, size, writable=writable)
        ordinal_of_memory = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        lies_on = int(calls(Step.MAP, driver.cuPointerGetAttribute, ordinal_of_memory, address))
        undo.pop_all()
    return _VmmRegion(address, size, lies_on, ordinal=calls.ordinal, writable=became_writable)


def _grant_access(calls: _Calls, address: int, size: int, *, writable: bool) -> bool:
    """Let the current GPU access the mapping; whether it may write."""
    driver = calls.driver
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = calls.ordinal
    if not writable:
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        (status,) = driver.cuMemSetAccess(address, size, [access], 1)
        if status == driver.CUresult.CUDA_SUCCESS:
            return False
        _log.debug("the driver maps nothing read-only (%s): mapping it writable", status.name)
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    calls(Step.MAP, driver.cuMemSetAccess, address, size, [access], 1)
    return True


# -- a GPU made current

_guard = threading.Lock()
_contexts: dict[int, Any] = {}
"""Primary contexts, which torch and cupy use too: retained once and for the life of the process."""


def _on_gpu(ordinal: int, memory_on: str, work: Callable[[_Calls], _Result]) -> _Result:
    driver = _driver()
    calls = _Calls(driver, ordinal, memory_on)

    def enter() -> None:
        with _guard:
            if ordinal not in _contexts:
                device = calls(Step.ENTER, driver.cuDeviceGet, ordinal)
                _contexts[ordinal] = calls(Step.ENTER, driver.cuDevicePrimaryCtxRetain, device)
            context = _contexts[ordinal]
        calls(Step.ENTER, driver.cuCtxSetCurrent, context)

    return in_own_thread(enter, lambda: work(calls))


def _driver() -> ModuleType:
    """cuda-python's binding of the driver, initialised. SegmentError, with what to do, without it."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise SegmentError(
            f"GPU memory by file descriptor needs cuda-bindings ({error}): install vcache[cuda12] or "
            "vcache[cuda13]"
        ) from error
    try:
        (status,) = driver.cuInit(0)
    except Exception as error:  # without a driver it raises what it likes, in each version something else
        raise SegmentError(f"no NVIDIA driver: {error}") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise SegmentError(f"no GPU visible: cuInit says {status.name}; see nvidia-smi")
    return driver  # type: ignore[no-any-return]  # cuda-python is untyped
