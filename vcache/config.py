"""The configuration: the one place that reads files and the environment.

    defaults  <  YAML file (--config, VCACHE_CONFIG)  <  VCACHE_* variables  <  keyword arguments

`load` returns frozen structs of which every value was checked, and says of each one where it came from. A
variable is named after its field: VCACHE_LOG_LEVEL is `log.level`. "none" stands for no value where a field
may have none; an empty variable counts as not set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta, field

from vcache.config_values import SIZE_MAX, SIZE_WANTED, Bytes, checked, suggestion
from vcache.config_values import parse_size as parse_size  # callers find it here
from vcache.errors import ConfigError
from vcache.limits import EXTENTS_MAX_DEFAULT, GIB, PINNED_BYTES_MAX_DEFAULT, SEGMENT_BYTES_MIN

DAY_S: Final = 86_400
YEAR_S: Final = 365 * DAY_S

Device = Annotated[
    str,
    Meta(
        pattern=r"^(shm|cuda):[0-9]{1,4}\Z",
        extra={"wanted": "a device such as 'shm:0' or 'cuda:0'"},
    ),
]
Text = Annotated[
    str,
    # A NUL ends every path and address: system calls refuse it, without saying which text it was.
    Meta(pattern=r"^[^\x00]+\Z", extra={"wanted": "text that is not empty and has no NUL character"}),
]
SegmentBytes = Annotated[
    Bytes,
    Meta(extra={"wanted": f"{SIZE_WANTED}, 0 or at least 8KiB,", "least": SEGMENT_BYTES_MIN}),
]
Address = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9._\[\]:-]+:[0-9]{1,5}\Z", extra={"wanted": "host:port, such as '10.0.0.1:50051'"}
    ),
]
Metadata = Annotated[
    str,
    Meta(
        pattern=r"^(P2PHANDSHAKE|https?://.+)\Z",
        extra={"wanted": "'P2PHANDSHAKE' or a URL such as 'http://10.0.0.1:8080/metadata'"},
    ),
]
Namespace = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_.-]{1,64}\Z",
        extra={"wanted": "1 to 64 letters, digits, '_', '.' or '-'"},
    ),
]
TierOrder = Annotated[
    str,
    Meta(
        pattern=r"^(rocksdb|mooncake|rocksdb *, *mooncake|mooncake *, *rocksdb)\Z",
        extra={"wanted": "the tiers in their order: 'rocksdb', 'mooncake' or 'rocksdb, mooncake'"},
    ),
]


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`vcache-metadata`, and what clients do about it when it is not there."""

    # One line added to vLLM shall be enough; whoever runs the server as a service turns it off.
    autostart: bool = True
    # A server that a client started ends after this long without a session, so that tests and notebooks leave
    # none behind; 0: never. Long enough to restart an engine in.
    idle_exit_s: Annotated[float, Meta(ge=0, le=YEAR_S)] = 60.0
    # lru is what everybody expects; s3fifo keeps one-time prompts from pushing out shared ones.
    policy: Literal["lru", "s3fifo"] = "lru"
    # Records in the extent table, 128 bytes each. A record that is not used takes no memory.
    extents_max: Annotated[int, Meta(ge=64, le=1 << 28)] = EXTENTS_MAX_DEFAULT
    # Age at which a chunk expires unless its store said otherwise; 0: never, room alone decides.
    default_ttl_s: Annotated[float, Meta(ge=0, le=10 * YEAR_S)] = 0.0
    # How long a reader may count on what it was granted: a few times the longest copy of one request.
    lease_ms: Annotated[int, Meta(ge=10, le=3_600_000)] = 5_000
    # Per session. Pins have no deadline, so a limit is all that keeps one reader from holding the whole pool.
    pinned_bytes_max: Bytes = PINNED_BYTES_MAX_DEFAULT
    # Group that may use the pool too (sockets and table get mode 0660 instead of 0600); None: only this user.
    group: Text | None = None


class ClientConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a process talks to the server."""

    # A request that takes longer is a miss. The server answers in well under a millisecond; the rest is for a
    # machine so loaded that it is not scheduled.
    request_timeout_ms: Annotated[int, Meta(ge=1, le=600_000)] = 500
    # For the session, which carries descriptors, and for a server that is being started (half a second).
    connect_timeout_ms: Annotated[int, Meta(ge=1, le=600_000)] = 2_000
    # How often it tells what it owns: what a lost reply leaked comes back within this time.
    declare_interval_s: Annotated[float, Meta(ge=0.05, le=3_600)] = 5.0


class SegmentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The segment that this process lends to the pool."""

    # Bytes, '2GiB', or 'auto': derived from what is free on the device. 0: this process lends nothing,
    # holders do.
    size: SegmentBytes | Literal["auto"] = "auto"
    # 0: where chunks are stored; 1: under that, for what is evicted there (host memory under a GPU's).
    rank: Annotated[int, Meta(ge=0, le=1)] = 0
    # NUMA node that shared memory lies on; None: wherever the kernel puts it.
    numa: Annotated[int, Meta(ge=0, le=1_023)] | None = None


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `VCacheEngine` stores, and how."""

    # Tokens of one chunk. Smaller ones share more, larger ones cost fewer keys; 256 is LMCache's too.
    chunk_tokens: Annotated[int, Meta(ge=1, le=65_536)] = 256
    # Whether the last tokens that fill no chunk are stored: pays only where the very same prompt comes again.
    store_partial_chunks: bool = False
    # Chunks that may wait for a lower tier. Waiting ones are pinned, so the pool loses that many extents at
    # most; what finds the queue full is not written below.
    tier_queue_chunks: Annotated[int, Meta(ge=1, le=65_536)] = 64
    # Streaming multiprocessors of a GPU that one copy may use, so that copies need not starve what computes
    # beside them; 0: no limit.
    sm_limit: Annotated[int, Meta(ge=0, le=1_024)] = 0


class RocksdbConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The tier on a local SSD. Engines of one machine that name the same directory share it."""

    # Ours alone, mode 700, on the SSD; made if it is not there. None: $XDG_CACHE_HOME/vcache, else
    # ~/.cache/vcache.
    directory: Text | None = None
    # Bytes of all chunks; beyond them the least recently used go.
    size: Annotated[
        int, Meta(ge=1 << 20, le=SIZE_MAX, extra={"wanted": f"{SIZE_WANTED}, at least 1MiB", "size": True})
    ] = 64 * GIB
    # Age at which a chunk expires, also one that was written under another value; 0: never.
    ttl_s: Annotated[float, Meta(ge=0, le=10 * YEAR_S)] = 0.0


class MooncakeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The tier on other machines: a Mooncake Store, whose client the wheel installed here is."""

    # host:port of the master.
    master: Address = "127.0.0.1:50051"
    # P2PHANDSHAKE, or the URL of Mooncake's HTTP metadata server (http://host:8080/metadata): one for all.
    metadata: Metadata = "P2PHANDSHAKE"
    # The address of this machine that the others reach. Its port is Mooncake's to choose.
    host: Text = "127.0.0.1"
    # auto: rdma where there is an InfiniBand or RoCE device, tcp elsewhere. Not checked against the others'.
    protocol: Literal["auto", "tcp", "rdma"] = "auto"
    # RDMA devices, as "mlx5_0,mlx5_1"; None: Mooncake looks for them.
    devices: Text | None = None
    # Memory that this process lends to the store; 0: none. What it holds goes with the process.
    lend: Bytes = 0
    # Copies of each chunk, on as many holders; with fewer holders there are fewer.
    replicas: Annotated[int, Meta(ge=1, le=8)] = 1
    # Whether the master evicts others first.
    soft_pin: bool = False
    # host:port of holders to put to first, as "10.0.0.2:12001,10.0.0.3:12001".
    preferred_segments: Text | None = None
    # What its keys begin with: stores that must not share chunks need different ones.
    namespace: Namespace = "vcache"
    # Age at which a chunk expires; 0: never.
    ttl_s: Annotated[float, Meta(ge=0, le=10 * YEAR_S)] = 0.0
    # Directory on an SSD to which what this process lends is offloaded; the master must have offload enabled.
    offload_directory: Text | None = None


class TiersConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where chunks go that the pool cannot hold."""

    # The lower tiers, the fastest first: "rocksdb", "mooncake", or "rocksdb, mooncake". None: only the pool.
    order: TierOrder | None = None
    # write-through: chunks are written below when they were stored, so that nothing is lost with the pool;
    # write-back: when the pool is about to evict them, so that what is never evicted is never written.
    policy: Literal["write-through", "write-back"] = "write-through"
    # Whether a lookup has what it found below loaded into the pool, so that the retrieve finds it there.
    prefetch: bool = True
    # A call that takes longer is a miss, and the tier is left alone for a while.
    deadline_ms: Annotated[int, Meta(ge=1, le=600_000)] = 2_000
    rocksdb: RocksdbConfig = field(default_factory=RocksdbConfig)
    mooncake: MooncakeConfig = field(default_factory=MooncakeConfig)


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Logging of the commands; a library leaves logging to its application (see `vcache.logs`)."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    # json for machines that collect logs: one JSON value a line.
    format: Literal["text", "json"] = "text"
    # Opened again when it was rotated away; None: standard error.
    file: Text | None = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of it. `load` makes one; the constructor itself checks nothing."""

    # Where the sockets, the extent table and the locks are: processes with the same one share a pool. None:
    # derived from the user (vcache/runtime.py).
    runtime_dir: Text | None = None
    # The device that this process' segment lies on. Several 'shm:N' on one machine play several GPUs.
    device: Device = "shm:0"
    server: ServerConfig = field(default_factory=ServerConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tiers: TiersConfig = field(default_factory=TiersConfig)
    log: LogConfig = field(default_factory=LogConfig)


class Row(NamedTuple):
    """One field of the effective configuration: `name` is dotted, `origin` as in `Loaded.origin`."""

    name: str
    value: bool | int | float | str | None
    origin: str


class Loaded(msgspec.Struct, frozen=True):
    """A checked configuration, and of each field ("log.level") where its value came from.

    An origin is "default", "file PATH", "env NAME" or "argument".
    """

    config: Config
    origin: Mapping[str, str]

    def describe(self) -> list[Row]:
        """Every field, in the order of declaration."""
        return [Row(name, value, self.origin[name]) for name, value in _flat(self.config)]


def load(
    path: str | Path | None = None, *, environ: Mapping[str, str] | None = None, **overrides: Any
) -> Loaded:
    """Read and check the configuration; raises `ConfigError`: field, source, value, what is wanted.

    `path` defaults to VCACHE_CONFIG, `environ` to the process' environment. Overrides are nested or dotted:
    `load(client={"request_timeout_ms": 5})`, `load(**{"client.request_timeout_ms": 5})`.
    """
    values = {name: known.default for name, known in _FIELDS.items()}
    origin = dict.fromkeys(_FIELDS, "default")
    for source in _sources(path, os.environ if environ is None else environ, overrides):
        for name, value in source.given:
            if origin[name] == source.origin:
                raise ConfigError(f"{name} (from {source.where}): given twice, wanted once")
            type_ = _FIELDS[name].type
            values[name] = checked(name, value, type_, source.where, is_text=source.origin.startswith("env "))
            origin[name] = source.origin
    return Loaded(_assemble(values), MappingProxyType(origin))


def environ_of(config: Config) -> dict[str, str]:
    """VCACHE_* variables from which a child process loads this very configuration."""
    text = {"True": "true", "False": "false", "None": "none"}
    return {_FIELDS[name].variable: text.get(str(value), str(value)) for name, value in _flat(config)}


class _Source(NamedTuple):
    origin: str
    where: str
    given: Iterable[tuple[str, object]]


class _Field(NamedTuple):
    type: Any
    default: Any
    variable: str


def _known(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, _Field]]:
    for member in msgspec.structs.fields(struct):
        name = prefix + member.name
        if isinstance(member.type, type) and issubclass(member.type, msgspec.Struct):
            yield from _known(member.type, f"{name}.")
        else:
            yield name, _Field(member.type, member.default, "VCACHE_" + name.upper().replace(".", "_"))


_FIELDS: Final = dict(_known(Config))
_NAMES: Final = {known.variable: name for name, known in _FIELDS.items()}
_SECTIONS: Final = {name[:at] for name in _FIELDS for at, letter in enumerate(name) if letter == "."}
_RESERVED: Final = {"VCACHE_CONFIG"}

# msgspec learns a type when it first converts to it, and crashes if two threads have it do so at once.
msgspec.convert({}, Config)


def _flat(config: Config) -> Iterator[tuple[str, Any]]:
    for name in _FIELDS:
        yield name, attrgetter(name)(config)


def _assemble(values: Mapping[str, Any]) -> Config:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        inside = tree
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = value
    return msgspec.convert(tree, Config)


def _sources(
    path: str | Path | None, environ: Mapping[str, str], overrides: Mapping[str, Any]
) -> Iterator[_Source]:
    """What overrides the defaults, the weakest first."""
    named_by = "" if path else " (from VCACHE_CONFIG)"
    path = path or environ.get("VCACHE_CONFIG")
    if path:
        yield _Source(f"file {path}", str(path), _nested(_read_yaml(Path(path), named_by), str(path)))
    for variable in sorted(environ):
        if variable.startswith("VCACHE_") and variable not in _RESERVED and environ[variable]:
            if variable not in _NAMES:
                raise ConfigError(f"{variable}: unknown variable{suggestion(variable, _NAMES)}")
            yield _Source(f"env {variable}", variable, [(_NAMES[variable], environ[variable])])
    yield _Source("argument", "argument", _nested(overrides, "argument"))


def _nested(tree: Mapping[Any, Any], where: str, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in _FIELDS:
            yield name, value
        elif name not in _SECTIONS:
            raise ConfigError(f"{name} (from {where}): unknown field{_nearest(name)}")
        elif isinstance(value, Mapping):
            yield from _nested(value, where, f"{name}.")
        elif value is not None:  # a section of which every line is commented out is None
            raise ConfigError(f"{name} (from {where}): got {value!r}, wanted a mapping of its fields")


def _nearest(name: str) -> str:
    section, _, last = name.rpartition(".")
    if section and section not in _SECTIONS:
        return suggestion(section, sorted(_SECTIONS))
    names = [*_FIELDS, *sorted(_SECTIONS)]
    return suggestion(
        last, [known.rpartition(".")[2] for known in names if known.rpartition(".")[0] == section]
    )


def _read_yaml(path: Path, named_by: str) -> Mapping[Any, Any]:
    import yaml  # here, since most processes have no file to read

    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}{named_by}: cannot be read, wanted a YAML file: {error}") from error
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:  # the latter: its scalars
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path}: got a {type(tree).__name__}, wanted a mapping of sections and fields at the top"
        )
    for mapping in _mappings(root):
        seen = set()
        for key, _ in mapping.value:
            if key.value in seen:
                raise ConfigError(
                    f"{path}, line {key.start_mark.line + 1}: {key.value!r} is given twice, wanted once"
                )
            seen.add(key.value)
    return tree


def _mappings(node: Any) -> Iterator[Any]:
    """A YAML mapping and all mappings in it."""
    yield node
    for _, value in node.value:
        if value.id == "mapping":
            yield from _mappings(value)
