"""What `kv_connector_extra_config` may say: the connector's own settings, and any field of VCache's
configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from vcache.config import Config, load
from vcache.config_values import suggestion
from vcache.errors import ConfigError

_SOURCE = "kv_connector_extra_config"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the connector uses the pool. `read_settings` makes one."""

    # Tokens of one chunk, a multiple of vLLM's block size; 0: one block, the finest sharing. More tokens cost
    # fewer
    # keys and share only at coarser boundaries.
    chunk_tokens: Annotated[int, Meta(ge=0, le=65_536)] = 0
    # sync: within the step that needs it, the shortest way to a first token. async: while other requests are
    # computed; needed with several KV groups and with asynchronous scheduling. auto: sync where it is
    # possible.
    load: Literal["auto", "sync", "async"] = "auto"
    # Whether a synchronous load brings one layer after the other while the model computes: more, smaller
    # copies.
    layerwise: bool = False
    # How long the scheduler waits for the pool's answer before it asks again in the next step.
    lookup_deadline_ms: Annotated[float, Meta(ge=0, le=1_000)] = 5.0
    # How long a request waits at most for what lower tiers have to come up into the pool, and asks again
    # meanwhile.
    fetch_deadline_ms: Annotated[float, Meta(ge=0, le=60_000)] = 2_000.0
    # Whether KV of generated tokens is stored, too: the next turn of a chat begins with them.
    store_generated: bool = True
    # Whether this engine stores at all (kv_role kv_consumer does not either).
    store: bool = True
    # Keys private to this engine, and new ones at each reset: for weights that are changed in place. auto:
    # where vLLM is
    # configured for that (weight transfer, sleep mode).
    private: Literal["auto", "yes", "no"] = "auto"
    # The YAML file with VCache's configuration; else VCACHE_CONFIG.
    config: Annotated[str, Meta(min_length=1)] | None = None


_WANTED = {
    "chunk_tokens": "an integer >= 0 and <= 65536",
    "load": "'auto', 'sync' or 'async'",
    "layerwise": "true or false",
    "lookup_deadline_ms": "a number >= 0 and <= 1000 (milliseconds)",
    "fetch_deadline_ms": "a number >= 0 and <= 60000 (milliseconds)",
    "store_generated": "true or false",
    "store": "true or false",
    "private": "'auto', 'yes' or 'no'",
    "config": "the path of a YAML file",
}


class Configured(NamedTuple):
    """The connector's settings and VCache's configuration."""

    settings: Settings
    config: Config


def read_settings(extra: Mapping[str, Any]) -> Configured:
    """Check `kv_connector_extra_config`. Raises ConfigError: field, value, what is wanted."""
    own = {name: value for name, value in extra.items() if name in _WANTED}
    for name, value in own.items():
        try:
            msgspec.convert({name: value}, Settings)
        except msgspec.ValidationError:
            raise ConfigError(f"{name} (from {_SOURCE}): got {value!r}, wanted {_WANTED[name]}") from None
    settings = msgspec.convert(own, Settings)
    fields = {name: value for name, value in extra.items() if name not in _WANTED}
    sections = {name.split(".")[0] for name in fields}
    known = set(Config.__struct_fields__)
    for name in sorted(sections - known):
        raise ConfigError(
            f"{name} (from {_SOURCE}): unknown field{suggestion(name, [*_WANTED, *sorted(known)])}"
        )
    try:
        loaded = load(settings.config, **fields)
    except ConfigError as error:
        words = str(error).replace("(from argument)", f"(from {_SOURCE})")
        if settings.config is not None and words.startswith(settings.config):
            words = f"config (from {_SOURCE}): {words}"
        raise ConfigError(words) from None
    return Configured(settings, loaded.config)
