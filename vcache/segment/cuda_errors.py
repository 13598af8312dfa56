"""What CUDA's refusals mean and what to do about them: a pure function of the call, its code and the facts.

Codes are CUresult's; cudaError_t, which cupy reports, has the same numbers for all that are named here:
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TYPES.html (CUresult).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from vcache.limits import MIB


class Step(Enum):
    """What was being done with the memory; the value says it in words."""

    ENTER = "the GPU cannot be used"
    ALLOCATE = "GPU memory could not be allocated"
    EXPORT = "GPU memory could not be exported"
    IMPORT = "a peer's GPU memory could not be opened"
    MAP = "GPU memory could not be mapped"
    COPY = "GPU memory could not be read or written"
    FREE = "GPU memory could not be given back"


class Way(Enum):
    """How GPU memory gets from process to process; the value is the descriptor's kind."""

    FD = "cuda-fd"
    """Virtual memory management: a POSIX file descriptor, passed like a memfd."""

    IPC = "cuda"
    """Legacy CUDA IPC: a handle of 64 bytes."""

    @property
    def title(self) -> str:
        """For people."""
        return "a file descriptor" if self is Way.FD else "legacy CUDA IPC"


@dataclass(frozen=True)
class Facts:
    """What is known when a call fails.

    own: the GPU that the call was made on. memory_on: the GPU that the memory lies on. Both are GPUs' UUIDs
    ("GPU-…", "MIG-…"), as are those `seen` by this process. peer_access: from `own` to `memory_on`; None if
    nobody could tell. free_bytes, total_bytes: of `own`; 0 if not known.
    """

    way: Way
    own: str = ""
    memory_on: str = ""
    seen: tuple[str, ...] = ()
    peer_access: bool | None = None
    free_bytes: int = 0
    total_bytes: int = 0


_SEE_ALL: Final = (
    "let each engine see all GPUs of the pool (CUDA_VISIBLE_DEVICES; in a container --gpus all) and choose "
    'its own by device: "cuda:N"'
)
_RESTART: Final = "an earlier fault has ended this process' use of the GPU: restart it; see dmesg for an Xid"

_ADVICE: Final[dict[int, str]] = {
    3: "CUDA could not start: see nvidia-smi",  # NOT_INITIALIZED
    35: "the driver is older than this CUDA: update it, or install the extra cuda12",  # INSUFFICIENT_DRIVER
    46: "another process has the GPU to itself: nvidia-smi -c DEFAULT lets several in",  # DEVICE_UNAVAILABLE
    100: "no GPU is visible: see CUDA_VISIBLE_DEVICES and nvidia-smi; start a container with --gpus",
    214: _RESTART,  # ECC_UNCORRECTABLE
    217: "there is no peer access between these GPUs: see nvidia-smi topo -p2p r",  # PEER_ACCESS_UNSUPPORTED
    700: _RESTART,  # ILLEGAL_ADDRESS
    711: "this GPU has peer access to as many others as it can have",  # TOO_MANY_PEERS
    719: _RESTART,  # LAUNCH_FAILED
    802: "the fabric is not ready: start nvidia-fabricmanager of the driver's version",  # SYSTEM_NOT_READY
    803: "the driver's user and kernel parts differ: restart after the update, or mend the container",
    804: "the CUDA compatibility package does not fit this GPU: update the driver",
    805: "the MPS server does not answer: restart it, or run without MPS",  # MPS_CONNECTION_FAILED
}
"""By code, where it says all that is to be said."""

_OUT_OF_MEMORY: Final = 2
_INVALID_DEVICE: Final = 101
_NOT_PERMITTED: Final = 800
_SHARING: Final = (Step.EXPORT, Step.IMPORT, Step.MAP)

_UNEXPLAINED: Final = {
    (Step.ALLOCATE, Way.FD): "the GPU, its driver or its virtual machine has no memory that can be exported",
    (Step.EXPORT, Way.FD): "the driver (WSL? vGPU?) does not export memory as a file descriptor",
    (Step.EXPORT, Way.IPC): "memory of this GPU cannot be exported by CUDA IPC (WSL, vGPU, integrated GPUs)",
    (Step.IMPORT, Way.FD): "the descriptor is not one of GPU memory here: start all containers of the pool "
    "with the same GPUs and the same driver",
    (Step.IMPORT, Way.IPC): "a container may refuse CUDA IPC: start all of them with --ipc=host --pid=host, "
    "for the same user, or install cuda-bindings, which needs neither",
    (Step.MAP, Way.FD): "the memory is not what its descriptor says, or this GPU cannot reach it",
}


def advice(step: Step, code: int, facts: Facts) -> str:
    """What to do about CUDA's error `code`; always a sentence."""
    is_peers = step in (Step.IMPORT, Step.MAP) and facts.memory_on != ""
    if code == _OUT_OF_MEMORY:
        return _room(step, facts)
    if code in _ADVICE:
        return _ADVICE[code]
    if is_peers and facts.seen and facts.memory_on not in facts.seen:
        seen = ", ".join(facts.seen)
        return f"its GPU {facts.memory_on} is not among those that this process sees ({seen}): {_SEE_ALL}"
    if code == _INVALID_DEVICE and not facts.seen:
        return f"the GPU is not visible to this process: {_SEE_ALL}"
    if step in _SHARING and any(gpu.startswith("MIG-") for gpu in (facts.own, facts.memory_on)):
        return _mig(facts)
    if is_peers and facts.peer_access is False:
        return (
            f"there is no peer access from {facts.own} to {facts.memory_on}: see nvidia-smi topo -p2p r; "
            "without NVLink an IOMMU or ACS may be in the way"
        )
    if code == _NOT_PERMITTED:
        return "it is not allowed here: a container, MPS or confidential computing may be in the way"
    if step is Step.MAP and not is_peers:
        return "this driver cannot map memory that it has allocated: see nvidia-smi"
    return _UNEXPLAINED.get((step, facts.way), "see `vcache doctor`")


def _room(step: Step, facts: Facts) -> str:
    free = (
        f"the GPU has {facts.free_bytes // MIB} of {facts.total_bytes // MIB} MiB free"
        if facts.total_bytes
        else "the GPU has not enough memory left"
    )
    if step is Step.ALLOCATE:
        return f"{free}: ask for less (segment.size, --size), or free memory there"
    return f"{free}: a mapping needs a little, a process' first use of a GPU hundreds of MiB; free some there"


def _mig(facts: Facts) -> str:
    if facts.memory_on and facts.own != facts.memory_on:
        return (
            "MIG instances cannot reach each other's memory: give all processes one instance, or turn MIG off"
        )
    return "a MIG instance may not share memory between processes: use a whole GPU, or segments on shm"


def in_words(step: Step, call: str, code: int, name: str, facts: Facts) -> str:
    """One sentence for a SegmentError: what failed, what CUDA said, what to do."""
    where = f" ({facts.way.title})" if step in _SHARING else ""
    return f"{step.value}{where}: {call} says {name} ({code}); {advice(step, code, facts)}"
