"""Segments in GPU memory: plain cudaMalloc memory, exported by CUDA IPC, with cupy's binding of the runtime.

Plain, because IPC shares whole allocations: memory of torch's or cupy's pool would share strangers' bytes,
and expandable segments cannot be exported at all. GPUs are known by UUID, since CUDA_VISIBLE_DEVICES
renumbers them.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from vcache.errors import ArgumentError, SegmentError
from vcache.limits import MIB, SEGMENT_ALIGN_BYTES
from vcache.segment.base import MappedSegment, Segment
from vcache.segment.gpu import copy_in, copy_out, device_count, gpu_uuid, on_device
from vcache.segment.header import (
    HEADER_BYTES,
    SegmentDescriptor,
    new_incarnation,
    new_segment_id,
    pack_header,
    verify_header,
)

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_IPC_HANDLE_BYTES: Final = 64

Identity = tuple[bytes, int]
"""Segment id and incarnation."""


@dataclass
class _Opened:
    """An IPC handle that this process has open: at most once, however many map it."""

    address: int
    ordinal: int
    """The importer's own GPU, with which it was opened."""
    lies_on: int
    """The GPU, as this process numbers them, that CUDA says the memory is of."""
    users: int = 0


_guard = threading.Lock()
_opened: dict[Identity, _Opened] = {}
_held: set[Identity] = set()
"""Segments of this process itself: their handles cannot be opened here."""


class CudaSegment(Segment):
    """GPU memory that this process holds."""

    def __init__(self, descriptor: SegmentDescriptor, address: int, ordinal: int) -> None:
        super().__init__(descriptor)
        self._address = address
        self._ordinal = ordinal
        with _guard:
            _held.add((self.segment_id, self.incarnation))

    @classmethod
    def allocate(cls, ordinal: int, size: int, *, numa: int | None = None) -> CudaSegment:
        """Allocate and export `size` bytes on GPU `ordinal`. Raises ArgumentError, SegmentError."""
        if numa is not None:
            raise ArgumentError("numa", numa, "nothing: GPU memory lies on its GPU")
        if size <= 0 or size % SEGMENT_ALIGN_BYTES:
            raise ArgumentError(
                "size", size, f"a positive multiple of {SEGMENT_ALIGN_BYTES} (2 MiB) on a GPU"
            )
        count = device_count()
        if ordinal >= count:
            raise ArgumentError(
                "device", f"cuda:{ordinal}", f"a GPU that this process sees (it sees {count})"
            )
        segment_id, incarnation = new_segment_id(), new_incarnation()
        header = pack_header(size=size, incarnation=incarnation, segment_id=segment_id)
        address, handle = on_device(ordinal, lambda runtime: _allocate(runtime, size, header))
        descriptor = SegmentDescriptor(
            "cuda", size, segment_id, incarnation, f"cuda:{ordinal}", handle, gpu_uuid(ordinal)
        )
        _log.info("allocated segment %s: %d MiB on cuda:%d", segment_id.hex(), size // MIB, ordinal)
        return cls(descriptor, address, ordinal)

    def _fd(self) -> None:
        return None

    def _whole(self) -> torch.Tensor:
        return _tensor(self._address, self.size, self._ordinal)

    def _read_incarnation(self) -> int:
        return self.incarnation

    def _end_incarnation(self) -> None:
        ended = pack_header(size=self.size, incarnation=0, segment_id=self.segment_id)
        try:
            on_device(self._ordinal, lambda runtime: copy_in(runtime, self._address, ended))
        except SegmentError:  # a GPU that failed: the table's incarnation has ended all the same
            _log.exception("the header of segment %s could not be ended", self.segment_id.hex())

    def _free(self) -> None:
        with _guard:
            _held.discard((self.segment_id, self.incarnation))
        on_device(self._ordinal, lambda runtime: runtime.free(self._address))


class MappedCudaSegment(MappedSegment):
    """A peer's GPU memory, opened here."""

    def __init__(self, descriptor: SegmentDescriptor, opened: _Opened) -> None:
        super().__init__(descriptor)
        self._opened = opened

    @classmethod
    def map(cls, descriptor: SegmentDescriptor, own_device: str | None = None) -> MappedCudaSegment:
        """Open a peer's segment with the importer's own GPU current. RemoteProtocolError, SegmentError.

        With the peer's GPU current a context would be made there: hundreds of MB for every pair.
        """
        identity = descriptor.segment_id, descriptor.incarnation
        ordinal = _own_ordinal(own_device)
        with _guard:
            if identity in _held:
                raise SegmentError(
                    "this process holds that segment itself: CUDA IPC opens only those of others"
                )
            opened = _opened.get(identity)
            if opened is None:
                address, lies_on = on_device(ordinal, lambda runtime: _open(runtime, descriptor))
                opened = _opened[identity] = _Opened(address, ordinal, lies_on)
            opened.users += 1
        return cls(descriptor, opened)

    def _whole(self) -> torch.Tensor:
        return _tensor(self._opened.address, self.size, self._opened.lies_on)

    def _read_incarnation(self) -> int:
        return self.incarnation

    def _free(self) -> None:
        opened = self._opened
        with _guard:
            opened.users -= 1
            if opened.users == 0:
                del _opened[(self.segment_id, self.incarnation)]
                on_device(opened.ordinal, lambda runtime: runtime.ipcCloseMemHandle(opened.address))


def _allocate(runtime: ModuleType, size: int, header: bytes) -> tuple[int, bytes]:
    free, total = runtime.memGetInfo()
    try:
        address = runtime.malloc(size)
    except runtime.CUDARuntimeError as error:
        raise SegmentError(
            f"segment of {size // MIB} MiB: {error}; the GPU has {free // MIB} of {total // MIB} MiB free"
        ) from error
    try:
        handle = bytes(runtime.ipcGetMemHandle(address))
        copy_in(runtime, address, header)
    except BaseException as error:
        runtime.free(address)
        if isinstance(error, runtime.CUDARuntimeError):
            raise SegmentError(
                f"the memory cannot be exported by CUDA IPC: {error} (MIG has no IPC)"
            ) from error
        raise
    return int(address), handle


def _open(runtime: ModuleType, descriptor: SegmentDescriptor) -> tuple[int, int]:
    """Where the peer's memory is here, after its header was verified: its address, and the GPU it lies on."""
    if len(descriptor.handle) != _IPC_HANDLE_BYTES:
        raise SegmentError(f"IPC handle: got {len(descriptor.handle)} bytes, wanted {_IPC_HANDLE_BYTES}")
    try:
        address = int(runtime.ipcOpenMemHandle(descriptor.handle, runtime.cudaIpcMemLazyEnablePeerAccess))
    except runtime.CUDARuntimeError as error:
        raise SegmentError(f"{_why_not_opened(descriptor)}: {error}") from error
    try:
        verify_header(copy_out(runtime, address, HEADER_BYTES), descriptor)
    except BaseException:
        runtime.ipcCloseMemHandle(address)
        raise
    return address, int(runtime.pointerGetAttributes(address).device)


def _why_not_opened(descriptor: SegmentDescriptor) -> str:
    """What is known of a handle that does not open, in words."""
    seen = [gpu_uuid(ordinal) for ordinal in range(device_count())]
    if descriptor.gpu_uuid not in seen:
        where = f"its GPU {descriptor.gpu_uuid} is not among those that this process sees ({', '.join(seen)})"
    else:
        number = seen.index(descriptor.gpu_uuid)
        where = (
            f"its GPU {descriptor.gpu_uuid} is cuda:{number} here (is there peer access between the GPUs?)"
        )
    return f"cannot open a peer's GPU memory; {where}; containers may need shared IPC and PID namespaces"


def _own_ordinal(own_device: str | None) -> int:
    if own_device is None:
        import torch

        return torch.cuda.current_device() if torch.cuda.is_available() else 0
    from vcache.segment.header import parse_device

    kind, ordinal = parse_device(own_device)
    if kind != "cuda" or ordinal >= device_count():
        raise ArgumentError("own_device", own_device, 'a GPU that this process sees, such as "cuda:0"')
    return ordinal


class _CudaArray:
    """Raw GPU memory as torch takes it:
    https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html.
    """

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _tensor(address: int, size: int, ordinal: int) -> torch.Tensor:
    """A uint8 tensor over GPU memory that does not keep it. SegmentError if torch cannot look at it."""
    import torch

    if not torch.cuda.is_available():
        raise SegmentError("this torch sees no GPU: install a CUDA build of torch that fits the driver")
    # The device must be the one that CUDA says the pointer is of: with any other torch would make a copy.
    tensor = torch.as_tensor(_CudaArray(address, size), device=f"cuda:{ordinal}")
    if tensor.data_ptr() != address:
        raise SegmentError(f"torch copied a segment (of cuda:{ordinal}) instead of looking at it")
    return tensor
