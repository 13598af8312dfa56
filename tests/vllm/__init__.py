"""Tests of the connector with real vLLM on CPUs; `make test-vllm` runs them in an environment of their own."""
