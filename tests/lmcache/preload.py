"""What a worker needs of LMCache, imported in the process that workers are forked from; it starts no thread."""

from __future__ import annotations

import os

os.environ["LMCACHE_TRACK_USAGE"] = "false"

import lmcache.v1.cache_engine  # noqa: E402, F401
import lmcache.v1.storage_backend.storage_manager  # noqa: E402, F401

import integration.lmcache_plugin  # noqa: E402, F401
import tests.lmcache.connector  # noqa: E402, F401
