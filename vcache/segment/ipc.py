"""GPU memory by legacy CUDA IPC: plain cudaMalloc memory and a handle of 64 bytes, with cupy's binding.

Plain, because IPC shares whole allocations: memory of torch's or cupy's pool would share strangers' bytes,
and expandable segments cannot be exported at all. Freeing it while an importer has it open is undefined.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from vcache.errors import SegmentError
from vcache.segment.cuda_errors import Step, Way, in_words
from vcache.segment.gpu import cuda_runtime, facts_of, in_own_thread
from vcache.segment.header import SegmentDescriptor
from vcache.segment.region import Region

_Result = TypeVar("_Result")


class _IpcRegion(Region):
    """Of this process (cudaMalloc), or a peer's that was opened here."""

    def __init__(self, address: int, size: int, lies_on: int, *, ordinal: int, is_own: bool) -> None:
        super().__init__(address, size, lies_on, writable=True)
        self._ordinal = ordinal
        self._is_own = is_own

    def read(self, offset: int, length: int) -> bytes:
        host = ctypes.create_string_buffer(length)
        self._copy(ctypes.addressof(host), self.address + offset, length)
        return host.raw

    def write(self, offset: int, content: bytes) -> None:
        host = ctypes.create_string_buffer(content, len(content))
        self._copy(self.address + offset, ctypes.addressof(host), len(content))

    def _copy(self, to: int, source: int, length: int) -> None:
        def copy(runtime: ModuleType) -> None:
            with _step(runtime, Step.COPY, "cudaMemcpyAsync", self._ordinal):
                # A stream of its own: the legacy default stream would wait for, and break, a capture.
                stream = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
                try:
                    runtime.memcpyAsync(to, source, length, runtime.memcpyDefault, stream)
                    runtime.streamSynchronize(stream)
                finally:
                    runtime.streamDestroy(stream)

        _on_device(self._ordinal, copy)

    def release(self) -> None:
        def free(runtime: ModuleType) -> None:
            call = "cudaFree" if self._is_own else "cudaIpcCloseMemHandle"
            with _step(runtime, Step.FREE, call, self._ordinal):
                if self._is_own:
                    runtime.free(self.address)
                else:
                    runtime.ipcCloseMemHandle(self.address)

        _on_device(self._ordinal, free)


def allocate(ordinal: int, size: int) -> tuple[Region, bytes, None]:
    """`size` bytes on GPU `ordinal`, their IPC handle, and no file descriptor. Raises SegmentError."""

    def work(runtime: ModuleType) -> tuple[Region, bytes, None]:
        with _step(runtime, Step.ALLOCATE, "cudaMalloc", ordinal):
            address = int(runtime.malloc(size))
        try:
            with _step(runtime, Step.EXPORT, "cudaIpcGetMemHandle", ordinal):
                handle = bytes(runtime.ipcGetMemHandle(address))
        except BaseException:
            runtime.free(address)
            raise
        return _IpcRegion(address, size, ordinal, ordinal=ordinal, is_own=True), handle, None

    return _on_device(ordinal, work)


def open_peer(descriptor: SegmentDescriptor, fd: int | None, ordinal: int, *, writable: bool) -> Region:
    """A peer's memory, opened with GPU `ordinal` current. Always writable: IPC has nothing else.

    With the peer's GPU current a context would be made there: hundreds of MB for every pair. Raises
    SegmentError.
    """
    del fd, writable

    def work(runtime: ModuleType) -> Region:
        with _step(runtime, Step.IMPORT, "cudaIpcOpenMemHandle", ordinal, descriptor.gpu):
            flags = runtime.cudaIpcMemLazyEnablePeerAccess
            address = int(runtime.ipcOpenMemHandle(descriptor.handle, flags))
        try:
            with _step(runtime, Step.IMPORT, "cudaPointerGetAttributes", ordinal, descriptor.gpu):
                lies_on = int(runtime.pointerGetAttributes(address).device)
        except BaseException:
            runtime.ipcCloseMemHandle(address)
            raise
        return _IpcRegion(address, descriptor.size, lies_on, ordinal=ordinal, is_own=False)

    return _on_device(ordinal, work)


def _on_device(ordinal: int, work: Callable[[ModuleType], _Result]) -> _Result:
    runtime = cuda_runtime()

    def enter() -> None:
        with _step(runtime, Step.ENTER, "cudaSetDevice", ordinal):
            runtime.setDevice(ordinal)

    return in_own_thread(enter, lambda: work(runtime))


@contextmanager
def _step(runtime: ModuleType, step: Step, call: str, ordinal: int, memory_on: str = "") -> Iterator[None]:
    """cupy's errors as SegmentError, in words."""
    try:
        yield
    except runtime.CUDARuntimeError as error:
        facts = facts_of(Way.IPC, ordinal, memory_on)
        raise SegmentError(in_words(step, call, int(error.status), str(error), facts)) from error
