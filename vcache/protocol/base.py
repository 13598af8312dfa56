"""What all messages share: the version, arrays of extents, the base class."""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

PROTOCOL_VERSION: Final = 3

EXTENT: Final = np.dtype(
    [
        ("index", "<u4"),
        ("generation", "<u4"),
        ("segment", "<u4"),
        ("reserved", "<u4"),
        ("offset", "<u8"),
        ("length", "<u8"),
    ]
)
"""An extent on the wire: where it is, and the generation under which it was granted (32 bytes)."""

HANDLE: Final = np.dtype([("index", "<u4"), ("generation", "<u4")])
"""An extent as its owner names it: a late or repeated message about an older generation changes nothing (8
bytes).
"""

Extents = NDArray[np.void]
Handles = NDArray[np.void]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages: immutable, encoded as an array that begins with its name."""
