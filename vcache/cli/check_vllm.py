"""Which `gpu_memory_utilization` vLLM can be given beside the holders: `vcache doctor --vllm`.

At its start vLLM wants that share of a GPU's whole memory to be free, or it does not start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vcache.cli import present
from vcache.cli.connect import NoServer, connected
from vcache.cli.findings import Finding
from vcache.config import Config
from vcache.errors import SegmentError
from vcache.limits import MIB

MARGIN_BYTES: Final = 512 * MIB
"""Left alone: what is free varies by the contexts of the processes that map segments, some hundred MB each.
"""

HOLDER_CONTEXT_BYTES: Final = 512 * MIB
"""What a holder that is still to be started takes beside its segment: its CUDA context."""

_PERCENT: Final = 100


def utilization(free: int, total: int, *, planned: int = 0, margin: int = MARGIN_BYTES) -> float:
    """The largest share of `total`, in whole percents, that is still free when `planned` is taken; 0.0 if
    none.

    All in bytes. planned: of segments whose holders are still to be started. margin: what stays free.
    """
    if total <= 0:
        return 0.0
    percents = max(0, free - planned - margin) * _PERCENT // total
    return min(percents, _PERCENT) / _PERCENT


def planned_bytes(segment_gib: float) -> int:
    """Memory that a holder of such a segment will take; 0 for none."""
    return int(segment_gib * 1024) * MIB + HOLDER_CONTEXT_BYTES if segment_gib else 0


def check_vllm(config: Config, segment_gib: float) -> Iterator[Finding]:
    """One finding for each GPU. segment_gib: of the segment that is still to be lent on each; 0: none."""
    from vcache.segment.gpu import device_count, device_label

    try:
        count = device_count()
    except SegmentError as error:
        yield Finding(
            check="vLLM",
            verdict="failed",
            found=f"gpu_memory_utilization is about GPUs, and none can be used: {error}",
        )
        return
    lent = _lent_bytes(config)
    for ordinal in range(count):
        device = f"cuda:{ordinal}"
        free, total = _memory_of(ordinal)
        held = lent.get(device_label(device), 0)
        yield judge(device, free, total, lent=held, planned=planned_bytes(segment_gib))


def judge(device: str, free: int, total: int, *, lent: int, planned: int) -> Finding:
    """What vLLM can be given on one GPU, and how that was computed."""
    share = utilization(free, total, planned=planned)
    room = f"{present.size(free)} of {present.size(total)} free"
    held = f"holders lend {present.size(lent)}" if lent else "no holder lends any of it"
    found = f"--gpu-memory-utilization {share:.2f}: {room}; {held}"
    if planned:
        found += f"; {present.size(planned)} less for a holder still to be started"
    found += f"; {present.size(MARGIN_BYTES)} left alone, rounded down"
    advice = ""
    if not share:
        advice = "nothing is left for vLLM: a smaller segment, or end what else has memory there (nvidia-smi)"
    elif not lent and not planned:
        advice = "start the holders first, or say what they will lend: --segment-gib N"
    return Finding(
        check=device,
        verdict="failed" if not share else "warning" if advice else "ok",
        found=found,
        advice=advice,
        facts={
            "gpu_memory_utilization": share,
            "free_bytes": free,
            "total_bytes": total,
            "lent_bytes": lent,
            "planned_bytes": planned,
            "margin_bytes": MARGIN_BYTES,
        },
    )


def _lent_bytes(config: Config) -> dict[str, int]:
    """By the device's label, what the pool's holders lend now; nothing where no server runs."""
    lent: dict[str, int] = {}
    try:
        with connected(config, "vcache doctor") as client:
            for row in client.stats().segments:
                lent[row.device] = lent.get(row.device, 0) + row.size
    except NoServer:
        return {}
    return lent


def _memory_of(ordinal: int) -> tuple[int, int]:
    """Free and all memory of a GPU, in bytes, as a process with a context there sees it, as vLLM will be."""
    import torch

    if not torch.cuda.is_available():
        raise SegmentError("this torch sees no GPU: install a CUDA build of torch that fits the driver")
    free, total = torch.cuda.mem_get_info(ordinal)
    return int(free), int(total)
