"""Where the memory of the process tests is: shared memory, or the GPUs that VCACHE_TEST_DEVICE names.

    VCACHE_TEST_DEVICE=cuda:0 pytest tests/processes            all segments and pages on one GPU
    VCACHE_TEST_DEVICE=cuda:0,cuda:1 pytest tests/processes     "shm:0" and "shm:1" of the tests are two GPUs

The tests speak of "shm:N". Read when it is imported, before the tests' configuration forgets such variables.
"""

from __future__ import annotations

import os
import re

from vcache.config import parse_size
from vcache.limits import SEGMENT_ALIGN_BYTES

GPUS = [each for each in os.environ.get("VCACHE_TEST_DEVICE", "").split(",") if each]
"""Empty: shared memory."""

if wrong := [each for each in GPUS if not re.fullmatch(r"cuda:[0-9]+", each)]:
    raise ValueError(
        f"VCACHE_TEST_DEVICE: got {', '.join(wrong)}, wanted cuda:0, or several such as cuda:0,cuda:1"
    )


def device_of(label: str) -> str:
    """What plays the device that a test names: with GPUs "shm:1" is the second one, or the only one."""
    if not GPUS or label.startswith("cuda"):
        return label
    return GPUS[int(label.rpartition(":")[2]) % len(GPUS)]


def size_on(device: str, size: int | str) -> int | str:
    """A segment's size as that device can have it: on a GPU in steps of 2 MiB, rounded up."""
    if not device.startswith("cuda"):
        return size
    return (
        -(-parse_size(int(size) if str(size).isdigit() else size) // SEGMENT_ALIGN_BYTES)
        * SEGMENT_ALIGN_BYTES
    )


def tensors_on(device: str) -> str:
    """Where paged KV is whose engine has that device, as torch names it."""
    return device if device.startswith("cuda") else "cpu"
