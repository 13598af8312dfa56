"""vLLM's plugin hook: makes `"kv_connector": "VCacheConnector"` known."""

from __future__ import annotations


def register() -> None:
    """Register the connector with vLLM; may be called again."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "VCacheConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "VCacheConnector", "integration.vllm_connector", "VCacheConnector"
        )
