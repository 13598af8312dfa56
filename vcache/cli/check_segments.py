"""The doctor's checks of segments: exported here, mapped by a second process, bytes compared both ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vcache.cli import present
from vcache.cli.findings import Finding
from vcache.cli.peer import COMPARED_BYTES, Peer, Probed, is_pattern, pattern
from vcache.config import Config
from vcache.errors import SegmentError
from vcache.limits import MIB
from vcache.segment import DATA_OFFSET, Segment, allocate, decode_descriptor

_SHM_BYTES: Final = 64 * MIB
_CUDA_BYTES: Final = 258 * MIB
_MEASURED_SHARE: Final = 0.9
"""Of a segment, for the bandwidth: what is left after the bytes that are compared."""


@dataclass(frozen=True)
class Pair:
    """One GPU's memory opened by a process on another. error: empty if the bytes were right both ways.

    gbytes_per_s: read by that process; written_gbytes_per_s: written by it. opened_ms: for opening it.
    way: how the memory is shared.
    """

    holder: str
    reader: str
    peer_access: bool
    error: str
    gbytes_per_s: float
    written_gbytes_per_s: float = 0.0
    opened_ms: float = 0.0
    way: str = ""


def check_shared_memory(config: Config) -> Iterator[Finding]:
    """A segment as the pool uses it, small, between this process and a second one."""
    with Peer() as peer, allocate("shm:0", _SHM_BYTES, numa=config.segment.numa) as segment:
        probed = exchange(peer, segment, own_device=None)
    where = "" if config.segment.numa is None else f" on NUMA node {config.segment.numa}"
    if probed.error:
        yield Finding(
            check="shared memory",
            verdict="failed",
            found=f"a segment{where} mapped by a second process: {probed.error}",
            advice="a container or security module is in the way of memfds or SCM_RIGHTS: try without it",
        )
        return
    yield Finding(
        check="shared memory",
        verdict="ok",
        found=f"a segment{where} mapped by a second process: bytes right both ways, "
        f"{probed.gbytes_per_s:.1f} GB/s read, {probed.written_gbytes_per_s:.1f} written",
        facts={
            "gbytes_per_s": probed.gbytes_per_s,
            "written_gbytes_per_s": probed.written_gbytes_per_s,
            "opened_ms": probed.opened_ms,
        },
    )


def exchange(
    peer: Peer, segment: Segment, *, own_device: str | None, seed: int = 1, is_measured: bool = True
) -> Probed:
    """Write, have the peer compare and write, compare; the peer measures on the way if it is to."""
    borrow = segment.borrow()
    assert borrow is not None, "our own segment, which nobody closed"
    with borrow:
        view = segment.view(DATA_OFFSET, COMPARED_BYTES)
        view.copy_(pattern(seed))
        if view.is_cuda:
            import torch

            torch.cuda.synchronize(view.device)
        measured = int(segment.size * _MEASURED_SHARE) if is_measured else 0
        probed = peer.probe(segment, seed, own_device=own_device, measured_bytes=measured)
        if not probed.error and not is_pattern(view, seed + 1):
            return Probed("this process reads other bytes than the second one wrote")
    return probed


def check_gpus(config: Config) -> Iterator[Finding]:
    """Each GPU's memory opened by a process on every GPU; skipped where there is none."""
    from vcache.segment.gpu import device_count, gpu_uuid

    try:
        count = device_count()
    except SegmentError as error:
        is_wanted = config.device.startswith("cuda")
        advice = f"device is {config.device}: mend this, or set device to shm:0" if is_wanted else ""
        yield Finding(
            check="GPU", verdict="failed" if is_wanted else "skipped", found=str(error), advice=advice
        )
        return
    import torch

    if not torch.cuda.is_available():
        raise SegmentError(f"torch {torch.__version__} sees no GPU: install a build that fits the driver")
    for ordinal in range(count):
        name = torch.cuda.get_device_name(ordinal)
        yield Finding(
            check=f"cuda:{ordinal}",
            verdict="ok",
            found=f"{name}, {gpu_uuid(ordinal)}",
            facts={"uuid": gpu_uuid(ordinal), "name": name},
        )
    yield from judge(list(measured_pairs(count)))


def measured_pairs(count: int) -> Iterator[Pair]:
    """Every pair of the first `count` GPUs, one with itself (two processes on it) included."""
    import torch

    with Peer() as peer:
        for holder in range(count):
            try:
                segment = allocate(f"cuda:{holder}", _CUDA_BYTES)
            except SegmentError as error:
                yield Pair(f"cuda:{holder}", f"cuda:{holder}", False, str(error), 0.0)
                continue
            with segment:
                for reader in range(count):
                    access = holder == reader or torch.cuda.can_device_access_peer(reader, holder)
                    seed = 1 + 2 * (holder * count + reader)
                    probed = exchange(peer, segment, own_device=f"cuda:{reader}", seed=seed)
                    yield Pair(
                        f"cuda:{holder}",
                        f"cuda:{reader}",
                        access,
                        probed.error,
                        probed.gbytes_per_s,
                        probed.written_gbytes_per_s,
                        probed.opened_ms,
                        way_of(segment),
                    )


def judge(pairs: list[Pair]) -> Iterator[Finding]:
    """One finding of all pairs, and one of each that failed."""
    facts: dict[str, object] = {"pairs": [dict(vars(pair)) for pair in pairs]}
    for pair in pairs:
        if pair.error:
            yield Finding(
                check="GPU memory",
                verdict="failed",
                found=f"{pair.holder} read from {pair.reader}: {pair.error}",
                advice="see `nvidia-smi topo -p2p r`; containers may need --ipc=host",
            )
    blind = [f"{pair.holder} from {pair.reader}" for pair in pairs if not pair.peer_access and not pair.error]
    if blind:
        yield Finding(
            check="peer access",
            verdict="warning",
            found=f"none for {', '.join(blind)}: copies go through host memory",
            advice="see `nvidia-smi topo -p2p r` and -m; ACS or an IOMMU in the way of PCIe, or no NVLink",
        )
    good = [pair for pair in pairs if not pair.error]
    if good:
        read = [pair.gbytes_per_s for pair in good]
        written = [pair.written_gbytes_per_s for pair in good]
        yield Finding(
            check="GPU memory",
            verdict="ok",
            found=f"exported{_by(good)}, and opened by a second process: {len(good)} of {len(pairs)} pairs; "
            f"read at {min(read):.0f} to {max(read):.0f} GB/s, written at {min(written):.0f} to "
            f"{max(written):.0f} GB/s, opened in {max(pair.opened_ms for pair in good):.0f} ms at most",
            facts=facts,
        )


def _by(pairs: list[Pair]) -> str:
    ways = sorted({pair.way for pair in pairs if pair.way})
    return f" by {' and '.join(ways)}" if ways else ""


def way_of(segment: Segment) -> str:
    """How a GPU's segment gets to other processes, for people."""
    from vcache.segment.cuda_errors import Way

    return Way(decode_descriptor(segment.descriptor()[0]).kind).title


def pair_table(pairs: list[dict[str, object]]) -> object:
    """GB/s by holder (lines) and the process' GPU (columns), read and written, for people."""
    readers = sorted({str(pair["reader"]) for pair in pairs}, key=_ordinal)
    title = "GB/s, read / written by a process on"
    table = present.table(title, "memory of", *(f">{reader}" for reader in readers))
    for holder in sorted({str(pair["holder"]) for pair in pairs}, key=_ordinal):
        of = {str(pair["reader"]): pair for pair in pairs if pair["holder"] == holder}
        present.add_row(table, [holder, *(_cell(of.get(reader)) for reader in readers)])
    return table


def _cell(pair: dict[str, object] | None) -> str:
    if pair is None:
        return "–"
    if pair["error"]:
        return "failed"
    return f"{pair['gbytes_per_s']:.0f} / {pair['written_gbytes_per_s']:.0f}"


def _ordinal(device: str) -> int:
    return int(device.rpartition(":")[2])
