"""What workers need of LMCache, imported in the process that they are forked from; it starts no thread."""

from __future__ import annotations

import os

os.environ["LMCACHE_TRACK_USAGE"] = "false"

import lmcache.v1.cache_engine
import lmcache.v1.storage_backend.storage_manager  # noqa: F401

import integration.lmcache_plugin  # noqa: F401
import tests.lmcache.connector  # noqa: F401
