#!/usr/bin/env bash
# VCache first and another connector behind it: a prefix comes from whichever has it, the pool before the files; what
# is computed goes to both. Here the other one is vLLM's ExampleConnector, which keeps files (in /tmp/kv; they stay).
#
#   configs/vllm/multi-connector.sh MODEL [any option of vLLM]
set -euo pipefail
model=${1:?the model: a folder, or a name on the hub}
shift
cores=$(python -c 'import os; print(*sorted(os.sched_getaffinity(0)), sep=",")')
export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-$cores}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-4}

exec python -m vllm.entrypoints.openai.api_server \
    --model "$model" \
    --block-size 32 \
    --disable-hybrid-kv-cache-manager \
    --prefix-caching-hash-algo sha256_cbor \
    --enable-prompt-tokens-details \
    --kv-transfer-config '{
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "connectors": [
                {
                    "kv_connector": "VCacheConnector",
                    "kv_role": "kv_both",
                    "kv_load_failure_policy": "recompute",
                    "kv_connector_extra_config": {"segment": {"size": "2GiB"}}
                },
                {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"shared_storage_path": "/tmp/kv"}
                }
            ]
        }
    }' "$@"
