"""Tests with a real Mooncake master, which run where its wheel is installed (`make test-tiers`)."""
