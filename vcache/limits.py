"""Every limit, named once, with the reason for its value."""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

KEY_BYTES: Final = 32
"""A chunk key is a 32-byte digest: BLAKE2b-256, or vLLM's own SHA-256 block hash."""

FINGERPRINT_BYTES: Final = 16
"""A layout fingerprint: 128 bits keep accidental collisions out of reach, and two fit a cache line beside a
key.
"""

NAMESPACE_BYTES: Final = 8
"""A model's namespace in the table, for `clear` and `list` only; keys carry the full identity."""

TOKEN_BYTES: Final = 16
"""A session's token: 128 random bits, so that it cannot be guessed."""

FRAME_BYTES_MAX: Final = 4 * MIB
"""One request or reply: holds KEYS_PER_REQUEST_MAX keys and a full declaration, and no more."""

KEYS_PER_REQUEST_MAX: Final = 16_384
"""Keys in one request: 4 M tokens of 256-token chunks; bounds how long one request can hold the server."""

LIST_PAGE_MAX: Final = 1_000
"""Rows in one page of `list`, so that listing a large directory never delays other requests by much."""

EXTENT_ALIGN_BYTES: Final = 4 * KIB
"""Extents begin at multiples of a page: 16-byte accesses on a GPU, O_DIRECT towards a disk, no false sharing.
"""

EXTENTS_MAX_DEFAULT: Final = 1 << 20
"""Records in the extent table: 128 MiB of address space, of which only what is used takes memory."""

SLAB_EXTENTS_MAX: Final = 4096
"""Extents in one slab: bounds the work of cutting one, and of rebuilding it after a restart."""

SLABS_PER_SEGMENT: Final = 64
"""A slab's share of its segment: small enough that emptying one for another size costs little of the cache.
"""

SEGMENTS_MAX: Final = 256
"""Segments in one pool: 16 GPUs with some holders each; the table has that many records for them."""

SESSIONS_MAX: Final = 1_024
"""Sessions at once: each costs the server two or three descriptors, of which 1,024 is the usual default
limit's half.
"""

RESERVATIONS_PER_SESSION_MAX: Final = 65_536
"""Extents that one session may have reserved: a whole pool's worth of large chunks, but not the whole table.
"""

RIGHTS_PER_SESSION_MAX: Final = 16_384
"""Leases and pins (one per acquire) that a session may hold; together with a declaration they fit one frame.
"""

PINNED_EXTENTS_PER_SESSION_MAX: Final = 65_536
"""Extents that one session may have pinned: a declaration of all of them must fit one frame."""

REPLAYS_PER_SESSION: Final = 256
"""Replies kept per session for requests that are sent again: more than any client has outstanding at once."""

REPLAY_BYTES_PER_SESSION_MAX: Final = 4 * MIB
"""Bytes of those replies: with SESSIONS_MAX sessions that all retry, the server stays under 4 GiB, in
practice far below.
"""

LABELS_MAX: Final = 1_024
"""Names of models and layouts that the server remembers for people to read."""

LABEL_BYTES_MAX: Final = 512
"""One such name."""

SOCKET_PATH_BYTES_MAX: Final = 107
"""A Unix socket's path: `sockaddr_un.sun_path` has 108 bytes, one of them the final zero."""

SEGMENT_HEADER_BYTES: Final = 4 * KIB
"""What a segment's header takes, and so where its first extent may begin: one page, as extents are aligned to
pages.
"""

SEGMENT_BYTES_MIN: Final = 2 * SEGMENT_HEADER_BYTES
"""A segment is not smaller: its header, and one page for a chunk."""

SEGMENT_BYTES_DEFAULT_MIN: Final = 64 * MIB
"""A default segment is not smaller: two chunks of Llama-3-8B, the least that a prefix hit can come from."""

SEGMENT_BYTES_DEFAULT_MAX: Final = 4 * GIB
"""A default segment is not larger: nobody asked for it, so it must go unnoticed on a workstation."""

SEGMENT_DEFAULT_SHARE: Final = 4
"""A default segment is a quarter of what is available: the model and three more segments still fit."""

SEGMENT_ALIGN_BYTES: Final = 2 * MIB
"""GPU segments and default sizes are multiples of a large page: CUDA IPC shares whole allocations of that
granularity.
"""

CUDA_PROBE_BYTES: Final = 2 * MIB
"""A GPU segment for trying out how memory is shared: the smallest, for a GPU that may be nearly full."""

CUDA_PROBE_S: Final = 60.0
"""How long that trial may take in each way: a process starts and makes a context, on a busy machine."""

SEGMENT_FILL_STEP_BYTES: Final = 256 * MIB
"""Shared memory is allocated in steps, and room looked for before each: two that allocate at once must not
end in OOM.
"""

MEMORY_MARGIN_BYTES_MAX: Final = 512 * MIB
"""Memory that a segment leaves alone: what "available" promises is an estimate, and one page too many is an
OOM kill.
"""

MEMORY_MARGIN_SHARE: Final = 32
"""That margin on small machines and in small containers: one part in 32 of the memory."""

SEGMENT_DESCRIPTOR_BYTES_MAX: Final = 1 * KIB
"""An encoded segment descriptor: ids, a label and a 64-byte IPC handle take about 200 bytes."""

CHUNK_BYTES_MAX: Final = 4 * GIB - EXTENT_ALIGN_BYTES
"""One chunk: lengths in the extent table have 32 bits; a sensible chunk is a hundredth of this."""

MODEL_SAMPLES: Final = 64
"""Pieces of each weights file that a model's identity reads: a training that moves the weights at large shows
in some.
"""

MODEL_SAMPLE_BYTES: Final = 16 * KIB
"""One such piece; 1 MiB per file, so a model of 200 files is identified in about a second from a local disk.
"""

MODEL_PIECE_BYTES: Final = 4 * MIB
"""What is read at once of a file that a model's identity reads as a whole: no more memory than that."""

FAILURE_LOG_INTERVAL_S: Final = 10.0
"""An engine logs a failure of one cause at most this often: it is asked thousands of times a second, people
read logs.
"""

ASYNC_THREADS: Final = 2
"""Threads of one engine for operations with a handle: one loads while one stores; each copy has threads of
its own.
"""

ASYNC_OPERATIONS_MAX: Final = 64
"""Operations with a handle under way in one engine: each keeps pages and extents borrowed, and more would
only wait.
"""

RETRIEVE_TRIES: Final = 2
"""Times that a retrieve acquires anew when what it read was evicted meanwhile: under such pressure a third
would lose too.
"""

PAGED_KV_DESCRIBED_MAX: Final = 2
"""Sets of paged tensors whose description an engine keeps (and so keeps alive): a model's and its draft
model's.
"""

HOLDER_SEARCH_INTERVAL_S: Final = 10.0
"""How long an engine without a segment goes by what it last knew of its device's holder: holders come and go
by hand.
"""

TIER_LOAD_CHUNKS_MAX: Final = 8
"""Chunks read from a lower tier before they are scattered: bounds memory where the pool has no room for them.
"""

TIER_DRAIN_S: Final = 10.0
"""How long `close` goes on writing to the lower tiers: a full queue to a local SSD, and no engine hangs on a
broken one.
"""

CHANNELS_IDLE_MAX: Final = 8
"""ZeroMQ channels that a client keeps open between requests, one for each thread that makes some at once:
each costs the server a descriptor, and a thread beyond these only the opening of a new one.
"""

REQUEST_SLICE_MS: Final = 20
"""A waiting request looks this often whether the server is still there: soon, yet at no cost worth naming."""

REQUEST_SENDS_MAX: Final = 4
"""How often one request is sent within its timeout: a lost message costs a quarter of it, a slow server
little.
"""

RECONNECT_PAUSE_MIN_S: Final = 0.02
"""First pause before a session is tried again: a restarted server is back within a tenth of a second."""

RECONNECT_PAUSE_MAX_S: Final = 1.0
"""Longest such pause: a thousand clients without a server cost it, when it comes, a thousand handshakes in a
second.
"""

VERSION_RETRY_S: Final = 10.0
"""Pause after a server of another version: only an upgrade mends that."""

AUTOSTART_INTERVAL_S: Final = 30.0
"""One try in this time, by whichever client: a server that cannot start must not be started in a loop."""

AUTOSTART_PATIENCE_S: Final = 5.0
"""How long a server that is being started may take before its absence is logged: ten times what it needs."""

SESSION_PACKET_BYTES_MAX: Final = 4 * KIB
"""One message of a session's socket: a segment descriptor and some numbers, or words of refusal."""

SEGMENT_RETRY_S: Final = 1.0
"""How long a refused or unmappable segment is taken as such before it is asked for again."""

CLOSE_WAIT_S: Final = 2.0
"""How long `Client.close` waits for running copies and for importers, who have a second to let go."""

BYE_WAIT_S: Final = 0.5
"""How long an ending client waits to hear that its session is over: then its lock need not stay behind."""

TTL_MS_MAX: Final = 10 * 365 * 86_400_000
"""A chunk's time to live: ten years; the extent table counts seconds since the boot in 32 bits."""

FRAMES_WAITING_MAX: Final = 64
"""Frames of one connection that wait at the server, in each direction: a client has a handful under way on
one, and a flood of the largest frames takes a quarter of a gigabyte.
"""

SILENT_CONNECTIONS_MAX: Final = 256
"""Connections to the session socket that have not said Hello: twice its backlog, whose members all say it at
once.
"""

LAYOUTS_MAX: Final = 4_096
"""Layout fingerprints that the server remembers before it looks which of them are in use: far more than a
machine has models.
"""

HEADS_PER_SESSION_MAX: Final = 64
"""Reserves of one session for which the server remembers what was there already: twice as many as a client
has under way.
"""

DESCRIPTORS_WANTED: Final = 16 * SESSIONS_MAX
"""Open files that the server asks for: a session takes three, and one for each of its channels."""

PINNED_BYTES_MAX_DEFAULT: Final = 4 * GIB
"""Bytes that one session may pin unless configured: a prompt of 32 k tokens of Llama-3-8B (128 KiB each)."""

ENGINE_CLOSE_WAIT_S: Final = 30.0
"""How long `VCacheEngine.close` waits for calls under way: far longer than a copy takes, and no end that
hangs.
"""

RECORD_HEADER_BYTES: Final = 128
"""The header of a chunk record in a lower tier: it holds 104, and copies of what follows stay aligned."""

TIER_OWED_MAX: Final = 1_024
"""Chunks that a tier has still to forget once it answers: removed while they were written to it."""

TIER_OWED_PAUSE_S: Final = 1.0
"""How often it is told so again, a few at a time: what it cannot do, as on a disk that is read-only, shall
not keep it from all else.
"""

TIER_READERS: Final = 4
"""Threads that read one tier for an engine: enough to keep an SSD or a network busy. Calls that hang take
them up one by one, and with the last one the tier is out of use until they return.
"""

TIER_FAILURES_MAX: Final = 3
"""Failures in sequence after which a tier is left alone for a while; a call that misses its deadline is
enough by itself, since it cost whoever waited for it the whole deadline.
"""

TIER_PAUSE_MIN_S: Final = 1.0
"""How long a tier that failed is left alone at first: a service that restarts is back by then."""

TIER_PAUSE_MAX_S: Final = 30.0
"""The longest such pause: one call in so long may still cost an engine a deadline, and nobody waits for hits
longer than that once the tier is well again.
"""

TIER_OWNER_START_S: Final = 15.0
"""How long a call may wait for the process that owns a database to open it: seconds on a busy machine."""

TIER_OWNER_TRY_INTERVAL_S: Final = 5.0
"""One process starts an owner at most this often: one that cannot open its database must not be restarted in
a loop.
"""

TIER_OWNER_IDLE_S: Final = 30.0
"""How long the owner of a database stays without anybody connected: an engine that restarts finds it open."""

TIER_PACKET_BYTES_MAX: Final = 64 * KIB
"""One message to or from the owner of a database; keys and chunks go through shared memory beside it."""

TIER_CONNECTIONS_MAX: Final = 8
"""Connections that one engine keeps to the owner of a database between calls: its readers and writers."""

TIER_LIST_MAX: Final = 256
"""Rows in one page of a tier's listing: they fit one message."""

RECORD_PIECE_BYTES: Final = 1 * MIB
"""A chunk record is read and written so much at a time: it is in the processor's cache still when its
checksum is computed, and what two threads spend on each piece costs little beside it. Part of the record's
format.
"""

TIER_HELP_WAIT_PIECES: Final = 8
"""Whoever waits for a helper for as long as so many pieces take has been held up: it was stopped amid one,
which takes milliseconds, and not merely late.
"""

TIER_HELP_REST_CHUNKS: Final = 64
"""Chunks that are read without a helper after one that it held up: where processors are busy that costs
milliseconds, as ten or twenty chunks do, and must not be seen in the whole.
"""

TIER_USES_MAX: Final = 256
"""Reads of which an engine has not told the owner of a database yet: their keys fit one message."""

TIER_DISK_MARGIN_BYTES: Final = 64 * MIB
"""Bytes on the disk that a database leaves free, or a sixteenth of the disk where that is less: a file
system that is full to the last byte hurts everybody on it.
"""

OFFERS_MAX: Final = 256
"""Chunks that wait to be copied before they are evicted, or are being copied: bounds what is pinned so."""

OFFERS_PER_REQUEST_MAX: Final = 16
"""Chunks that one process takes at once to copy: half a gigabyte of large ones, and others find some, too."""

OFFER_AHEAD_SHARE: Final = 16
"""One extent in so many is free, or copied already, before a store needs it: a burst that is larger waits."""

OFFER_AHEAD_MAX: Final = 64
"""The most of them: two gigabytes of large chunks; to look for them costs every reserve of a full pool."""

OFFER_S: Final = 2.0
"""How long a chunk may wait to be copied, or be copied: then nobody waits for it, and it may be evicted."""

SAVE_WAIT_S: Final = 0.25
"""How long a store waits for extents that are being copied: a few large chunks to a slow disk. Then chunks go
that nobody has copied, and are counted.
"""

SAVE_LOOK_S: Final = 0.002
"""How often it looks: a fraction of what one copy takes."""

SAVES_MAX: Final = 16
"""Chunks that one engine writes to the lower tiers before they are evicted, at once: some for each tier."""

SAVE_HANG_LOOK_S: Final = 1.0
"""How often an engine looks for a tier that hangs while SAVES_MAX wait: seldom beside its deadline."""

PREFETCH_CHUNKS_MAX: Final = 256
"""Chunks that wait to be prefetched: some long prompts; later ones are loaded when they are retrieved."""

PREFETCH_WAIT_S: Final = 10.0
"""How long a retrieve waits for a chunk that is being prefetched, instead of reading it a second time: a
tier's deadline and more, since the prefetch itself gives up at that.
"""

MOONCAKE_SEGMENT_MIN_BYTES: Final = 16 * MIB
"""The smallest segment that Mooncake mounts."""

MOONCAKE_CLOSE_S: Final = 5.0
"""How long closing waits for Mooncake calls under way: one to a holder that hangs takes 30 s, and an engine
does not end later for it.
"""

MOONCAKE_REACH_S: Final = 1.0
"""How long Mooncake's master may take to answer before the client is set up or closed, which holds the GIL
for half a minute if it does not.
"""

MOONCAKE_FULL_PAUSES_S: Final = (0.01, 0.02, 0.04, 0.08, 0.16)
"""Pauses between tries to put where there was no room: eviction runs behind, and takes about 10 ms."""

FORM_BYTES: Final = 1 * KIB
"""What says in a chunk's end which tensors it holds: twenty groups of layers, 0.003 % of a usual chunk."""

PART_ALIGN_BYTES: Final = 256
"""Where the tensors of one chunk begin: aligned for every element type and for a GPU's widest access."""

PARTS_MAX: Final = 4_096
"""Tensors in one chunk: more layers than a model has."""

STOCK_REFILL_EXTENTS: Final = 8
"""Extents that an allocator's stock asks for at once: a prompt's chunks cost one request in eight."""

STOCK_BYTES_MAX: Final = 256 * MIB
"""Extents that wait in a stock: a refill of the largest usual chunks; nobody else can use them."""

PROMISE_S: Final = 30.0
"""How long what a lookup found stays pinned for a load that has not come: ten times
LMCache's timeout of a lookup.
"""

PROMISES_MAX: Final = 1_024
"""Lookups whose load has not come yet: beyond it they are misses, or a flood of them would pin the pool."""

READS_IN_FLIGHT_MAX: Final = 32
"""Lookups and loads that an event loop may have under way: what comes beyond is a miss at once, for it
would wait longer than whoever asked does.
"""

READ_THREADS: Final = 2
"""Threads for them: one waits for a lower tier while another answers from the pool."""

PARTIAL_CHUNKS_MAX: Final = 1_024
"""Chunks of which some layers have been stored: the longest prompts of some requests at a time."""

SEGMENT_WAIT_S: Final = 60.0
"""How long a plugin waits at its start for its own segment: tens of gigabytes are populated."""

KEEPER_INTERVAL_S: Final = 2.0
"""How often a plugin looks for promises that ran out and for engines whose hashes differ."""
