#!/usr/bin/env bash
# Everything on the real runtime, in one go: convert, build, parity, serve, one client request.
#
#     scripts/verify_on_vendor_container.sh CHECKPOINT OUTPUT [TARGET] [PRECISION] [TP]
#
# To be run inside NVIDIA's TensorRT-LLM release container on a machine with the target's GPU(s), from a checkout of ngpt-deploy.
# Version 1.2 goes through the engine flow, 1.3 and later through the PyTorch flow (no build, no parity of logits: serving only).
# It has never been run: this project's own checks of TensorRT-LLM are on a double of its API.
set -euo pipefail

usage() { sed -n '2,8p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2; exit 2; }
say() { printf '\n== %s\n' "$*"; }
refuse() { echo "verify_on_vendor_container: $*" >&2; exit 2; }

[[ $# -ge 2 && $# -le 5 ]] || usage
checkpoint=$(realpath -- "$1")
output=$(realpath -m -- "$2")
target=${3:-h100-trtllm} precision=${4:-bf16} tp=${5:-1} port=${PORT:-8000}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

[[ -e $checkpoint ]] || refuse "no checkpoint at $checkpoint"
[[ ! -e $output ]] || refuse "$output exists: name a folder that does not"
command -v nvidia-smi >/dev/null || refuse "no nvidia-smi: this needs a GPU"
version=$(python3 -c 'import tensorrt_llm; print(tensorrt_llm.__version__)' 2>/dev/null | tail -n 1) || true
[[ -n ${version:-} ]] || refuse "python3 cannot import tensorrt_llm: run this in NVIDIA's TensorRT-LLM container"
nvidia-smi --query-gpu=name,compute_cap,memory.total --format=csv
mkdir -p "$output"

server=""
stop() { [[ -z $server ]] || { kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; }; }
trap stop EXIT

# ask: wait for the server, then request one completion and print it.
ask() {
    for _ in $(seq 300); do
        curl -sf "http://127.0.0.1:$port/health" >/dev/null && break
        kill -0 "$server" 2>/dev/null || refuse "the server stopped; see $output/serve.log"
        sleep 2
    done
    curl -sf "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' \
        -d '{"model": "ngpt", "prompt": "What is the largest planet in solar system?", "max_tokens": 10, "temperature": 0}' \
        | tee "$output/completion.json"
    echo
}

case $version in
1.2.*)
    say "a Python environment with transformers 5 beside the container's own packages"
    python3 -m venv --system-site-packages "$output/venv"
    "$output/venv/bin/pip" install -q 'transformers>=5,<6' 'ml-dtypes>=0.5'
    say "convert and build: $target, $precision, tp $tp"
    "$output/venv/bin/python" "$root/scripts/build_engine.py" --checkpoint "$checkpoint" --target "$target" \
        --precision "$precision" --tp "$tp" --output "$output/built"
    say "PyTorch's logits"
    "$output/venv/bin/python" "$root/scripts/trtllm_parity.py" reference --checkpoint "$checkpoint" \
        --precision "$precision" --output "$output/reference.npz"
    say "a second engine that also gives the logits of every prompt token"
    "$output/built/build.sh" --gather_context_logits --output_dir "$output/parity-engine"
    say "parity"
    mpirun --allow-run-as-root --oversubscribe -n "$tp" python3 "$root/scripts/trtllm_parity.py" run \
        --engine "$output/parity-engine" --reference "$output/reference.npz" --output "$output/run.npz"
    python3 "$root/scripts/trtllm_parity.py" compare --reference "$output/reference.npz" --run "$output/run.npz"
    if [[ $tp -gt 1 ]]; then
        say "serving is left out: trtllm-serve's worker processes would not know the architecture"
        exit 0
    fi
    say "serve and ask"
    # trtllm-serve reads the engine's configuration in Python, where our import has added the architecture.
    python3 -c 'import sys, export.trtllm.model
from tensorrt_llm.commands.serve import main
sys.argv[0] = "trtllm-serve"
main()' serve "$output/built/engine" --backend tensorrt --tokenizer "$output/built" --port "$port" >"$output/serve.log" 2>&1 &
    server=$!
    ask
    ;;
*)
    say "PyTorch flow, version $version: serve and ask"
    trtllm-serve "$checkpoint" --custom_module_dirs "$root/export/trtllm/custom/ngpt_trtllm" --tp_size "$tp" --port "$port" \
        >"$output/serve.log" 2>&1 &
    server=$!
    ask
    ;;
esac
say "done: results are in $output"
