"""Which ways of loading an engine allows, and what its configuration makes worse than it need be."""

from __future__ import annotations

import logging
from typing import Any

from integration.vllm.groups import Groups
from vcache.errors import ConfigError

_log = logging.getLogger("vcache.integration.vllm")


def loads_async(wanted: str, vllm_config: Any, groups: Groups, *, layerwise: bool) -> bool:
    """Whether to load asynchronously. Raises ConfigError for "sync" where a failed load could not be mended,
    and for layer-wise loads where they cannot be synchronous.

    vLLM can have a synchronous load's blocks computed anew only with one KV group, and only if no further
    step has been scheduled upon them.
    """
    overlapping = vllm_config.max_concurrent_batches > 1
    if wanted == "sync" and len(groups) > 1:
        raise ConfigError(
            f"load: got 'sync' with {len(groups)} KV groups, wanted 'async': vLLM recovers from a failed "
            "synchronous load only with one"
        )
    if wanted == "sync" and overlapping:
        raise ConfigError(
            "load: got 'sync' with asynchronous scheduling, wanted 'async' or --no-async-scheduling: the "
            "next step would be computed upon a load that failed"
        )
    load_async = wanted == "async" or len(groups) > 1 or overlapping
    if layerwise and load_async:
        raise ConfigError(
            "layerwise: got true with asynchronous loads, wanted false, or --no-async-scheduling and one KV "
            "group"
        )
    return load_async


def warn_of_traps(vllm_config: Any) -> None:
    """Log what works, but not as its user may expect."""
    transfer = vllm_config.kv_transfer_config
    if transfer.kv_load_failure_policy == "fail":
        _log.warning(
            "kv_load_failure_policy is 'fail', vLLM's default: a request whose KV is lost while it is loaded "
            'ends with an error. With "kv_load_failure_policy": "recompute" it is computed.'
        )
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if not algorithm.endswith("_cbor"):
        _log.warning(
            "prefix_caching_hash_algo is %r: such hashes can differ between processes; engines then do not "
            "find each other's prefixes. Use --prefix-caching-hash-algo sha256_cbor.",
            algorithm,
        )
