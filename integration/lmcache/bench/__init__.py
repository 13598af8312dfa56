"""What benchmarks/lmcache_backends.py measures: an LMCacheEngine in a process of its own."""
