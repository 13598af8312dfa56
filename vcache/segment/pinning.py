"""Host memory that a GPU's kernels and copy engines reach by themselves: registered while it is mapped.

Without it a kernel that is given the address faults, and a copy goes through a bounce buffer of the driver's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from vcache.errors import SegmentError
from vcache.limits import MIB

Registrar = Callable[[int, int], Callable[[], None]]
"""(address, bytes) → what undoes it."""

_FOR_ALL_GPUS: Final = 1  # cudaHostRegisterPortable
_ADDRESSABLE: Final = 2  # cudaHostRegisterMapped


def register_with_cuda(address: int, size: int) -> Callable[[], None]:
    """Lock pages into memory and let all GPUs of this process reach them; the result undoes it, and must be
    called before they are unmapped. Raises SegmentError.
    """
    import torch

    try:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(address, size, _FOR_ALL_GPUS | _ADDRESSABLE))
    except (RuntimeError, AssertionError) as error:  # no driver, or torch without CUDA
        raise SegmentError(f"no GPU can reach shared memory here: {error}") from error
    if code:
        raise SegmentError(
            f"no GPU can reach {size // MIB} MiB of shared memory: cudaHostRegister says {code}; a container "
            "needs --ulimit memlock=-1"
        )

    def undo() -> None:
        if failed := int(runtime.cudaHostUnregister(address)):
            raise SegmentError(f"cudaHostUnregister says {failed}")

    return undo
