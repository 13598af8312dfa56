"""How a backend joins the pool. LMCache may construct it again over the first one: both are one session."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

from integration.lmcache.core import Core
from integration.lmcache.hashes import Comparison, fingerprint, session_name
from integration.lmcache.metrics import publish
from vcache.layout import KVLayout

_cores: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Core] = weakref.WeakKeyDictionary()
"""By LMCache's event loop, which outlives a backend that it forgets."""


def join(
    config: Any,
    metadata: Any,
    loop: asyncio.AbstractEventLoop | None,
    layout: KVLayout,
    *,
    lends: bool,
    device: str,
) -> Core:
    """The core of the backend that this one takes the place of, or a new one. Raises as `Core`.

    device: where the engine has its KV, as LMCache says it.
    """
    core = _cores.get(loop) if loop is not None else None
    if core is None or core.closed:
        role = f"{metadata.role or 'worker'}-{metadata.worker_id}"
        core = Core(
            config.extra_config,
            layout=layout,
            model=metadata.model_name,
            name=session_name(role, metadata.model_name, fingerprint(config, metadata)),
            lends=lends,
            device=device,
        )
        if loop is not None:
            _cores[loop] = core
    return core


def belong(core: Core, owner: object, config: Any, metadata: Any, sweep: Callable[[], None]) -> None:
    """From now on the core is `owner`'s to close; its keeper calls `sweep` and compares hashes."""
    core.owner = owner
    comparison = Comparison(core.name, config.pre_caching_hash_algorithm)

    def look_after() -> None:
        sweep()
        if core.client.connected:
            comparison.look(core.client.stats().sessions)

    core.on_turn = look_after
    publish(core, metadata, config)
