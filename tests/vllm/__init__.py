"""Tests of the connector with real vLLM on CPUs: `make test-vllm`, in an environment of their own."""
