#!/usr/bin/env bash
# A vLLM engine on a GPU. First, once per machine, the server; then, once per GPU and before the engines, so that
# vLLM's memory profiling sees what is really free, a holder:
#
#   export VCACHE_SERVER_AUTOSTART=false
#   vcache-metadata --config configs/gpu.yaml &
#   vcache segment --device cuda:0 --size 16GiB &
#   CUDA_VISIBLE_DEVICES=0 configs/vllm/gpu.sh MODEL [any option of vLLM]
#
# Not yet measured on GPUs.
set -euo pipefail
model=${1:?the model: a folder, or a name on the hub}
shift
export VCACHE_SERVER_AUTOSTART=false

exec vllm serve "$model" \
    --prefix-caching-hash-algo sha256_cbor \
    --enable-prompt-tokens-details \
    --kv-transfer-config '{
        "kv_connector": "VCacheConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"segment": {"size": 0}}
    }' "$@"
