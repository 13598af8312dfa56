#!/usr/bin/env bash
# One vLLM engine on CPUs with a segment of its own: what it computed it finds again, however small its KV cache is.
# No other process is needed: the engine starts the metadata server. More engines started the same way share with it.
#
#   configs/vllm/one-engine.sh MODEL [any option of vLLM]
set -euo pipefail
model=${1:?the model: a folder, or a name on the hub}
shift

# Cores for the model's threads. Set it always: with a KV connector vLLM otherwise leaves one core out.
cores=$(python -c 'import os; print(*sorted(os.sched_getaffinity(0)), sep=",")')
export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-$cores}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-4}

exec python -m vllm.entrypoints.openai.api_server \
    --model "$model" \
    --block-size 32 \
    --prefix-caching-hash-algo sha256_cbor \
    --enable-prompt-tokens-details \
    --kv-transfer-config '{
        "kv_connector": "VCacheConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"segment": {"size": "2GiB"}}
    }' "$@"
