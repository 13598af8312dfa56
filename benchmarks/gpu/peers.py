"""Every pair of GPUs: export, import in a second process, GB/s in both directions, and what an import takes.

What an import takes is memory on the holder's GPU while the importing process lives: on the same GPU that
process' own context, on another one what opening a peer's memory makes there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch

from benchmarks.gpu.device import torch_device
from benchmarks.report import Figure
from vcache.cli.check_segments import exchange
from vcache.cli.peer import Peer
from vcache.limits import MIB
from vcache.segment import allocate

TITLE: Final = "Memory of one GPU opened by a process on another"

_SEGMENT_BYTES: Final = 1026 * MIB


def run(labels: Sequence[str]) -> Iterator[Figure]:
    """Measure every pair of these devices, one with itself included."""
    return figures(labels, _SEGMENT_BYTES)


def figures(labels: Sequence[str], nbytes: int) -> Iterator[Figure]:
    """The figures of every pair, with segments of `nbytes`."""
    for holder in labels:
        with allocate(holder, nbytes) as segment:
            for number, reader in enumerate(labels):
                own_device = reader if reader.startswith("cuda") else None
                before = _free_bytes(holder)
                with Peer() as peer:
                    first = exchange(peer, segment, own_device=own_device, seed=4 * number, is_measured=False)
                    taken = before - _free_bytes(holder)
                    probed = (
                        first
                        if first.error
                        else exchange(peer, segment, own_device=own_device, seed=4 * number + 2)
                    )
                what = f"memory of {holder}, process on {reader}"
                if probed.error:
                    yield Figure(what, f"failed: {probed.error}")
                    continue
                yield Figure(
                    what,
                    f"{probed.gbytes_per_s:,.0f} GB/s read, {probed.written_gbytes_per_s:,.0f} GB/s written",
                )
                yield Figure(
                    f"{what}: opened in", f"{first.opened_ms:.1f} ms, again {probed.opened_ms:.1f} ms"
                )
                if torch_device(holder).type == "cuda":
                    yield Figure(f"{what}: the process takes there", f"{taken / MIB:,.0f} MiB")


def _free_bytes(label: str) -> int:
    device = torch_device(label)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
