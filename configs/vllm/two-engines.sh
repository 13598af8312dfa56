#!/usr/bin/env bash
# Two vLLM engines on CPUs over one pool that outlives them: a metadata server, a holder, and an engine on each half
# of the cores, at ports 8000 and 8001. All of them end with this script.
#
#   configs/vllm/two-engines.sh MODEL [any option of vLLM]
set -euo pipefail
model=${1:?the model: a folder, or a name on the hub}
shift
export VCACHE_SERVER_AUTOSTART=false  # the server is started here, and nowhere else
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-4}
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

vcache-metadata &
vcache segment --device shm:0 --size "${POOL:-4GiB}" &

read -ra cores <<<"$(python -c 'import os; print(*sorted(os.sched_getaffinity(0)))')"
half=$(((${#cores[@]} + 1) / 2))
for engine in 0 1; do
    mine=("${cores[@]:engine * half % ${#cores[@]}:half}")
    VLLM_CPU_OMP_THREADS_BIND=$(IFS=,; echo "${mine[*]}") \
        python -m vllm.entrypoints.openai.api_server \
        --model "$model" \
        --port $((8000 + engine)) \
        --block-size 32 \
        --prefix-caching-hash-algo sha256_cbor \
        --enable-prompt-tokens-details \
        --kv-transfer-config '{
            "kv_connector": "VCacheConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"segment": {"size": 0}}
        }' "$@" &
done
wait -n
