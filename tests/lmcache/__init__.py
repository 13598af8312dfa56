"""Tests with real LMCache; left out where it is not installed (`make test-lmcache` has it)."""
