"""The parts of VCache's connector for vLLM; `integration.vllm_connector` puts them together."""
