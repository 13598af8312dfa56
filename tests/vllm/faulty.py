"""The connector with places at which a load stops until the test lets it go on: everything else is the real
one.

The folder is named by FAULTS_FOLDER: with a file `stop` in it, a load that has copied its chunks, and has not
yet asked the fence, makes `reached` and waits for `go`. With a file `spoil`, too, its pages hold rubbish by
then, and none of its chunks has arrived.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from integration.vllm_connector import VCacheConnector
from vcache.engine.granted import GrantedLoads

_never = threading.Event()
_RUBBISH = 0x3F80
"""1.0 in bfloat16."""

_copy = GrantedLoads._scatter


def _copy_and_stop(self: GrantedLoads, *arguments: Any) -> Any:
    copied = _copy(self, *arguments)
    folder = Path(os.environ["FAULTS_FOLDER"])
    if (folder / "stop").exists():
        (folder / "stop").unlink()
        (folder / "reached").touch()
        deadline_s = time.monotonic() + 60
        while not (folder / "go").exists() and time.monotonic() < deadline_s:
            _never.wait(0.005)
        (folder / "go").unlink()
        if (folder / "spoil").exists():
            (folder / "spoil").unlink()
            transfer = arguments[0]
            for layer in transfer.paged.layers:
                layer[transfer.ids[transfer.ids >= 0]] = _RUBBISH
            return []
    return copied


class FaultyConnector(VCacheConnector):
    """Named by `kv_connector_module_path`."""


GrantedLoads._scatter = _copy_and_stop  # type: ignore[method-assign]
