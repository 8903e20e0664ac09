#!/usr/bin/env bash
# Checks the kernels and measures the step on the device of this machine, with one command within 9 minutes:
#
#   scripts/gpu_check.sh [DIRECTORY]         # DIRECTORY: for the result, default benchmarks/results
#
# Tunes the attention tiles (and then uses them), checks the results of the kernels against a float32 oracle, and
# compares the time of attention with cuDNN, XLA and (on Hopper and Blackwell, if it is installed) tokamax, and of the
# whole step of LLaMA 13B and 7B with transformers + PEFT. Prints tables and writes DIRECTORY/DEVICE-DATE.json, with a log
# and profiles of our step in the same directory. The exit status is 1 if a result is wrong or a part failed.
#
# Needs python with jax, flax, optax and pyyaml; torch, transformers and peft for the comparison, and tokamax for its
# backend. Without an accelerator everything runs on a tiny preset, which shows that the command works.
#
# PYTHON: the interpreter (python3). SECONDS_IN_ALL: the total time limit in seconds (530).
# Afterwards, to keep the tiles:  python benchmarks/tune_attention.py --accept DIRECTORY/DEVICE-DATE.json
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
results=${1:-benchmarks/results}
limit=${SECONDS_IN_ALL:-530}
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
mkdir -p "$results"
status=0

left() { echo $((limit - SECONDS)); }

part() { # NAME SECONDS COMMAND...: one part, at most this long; a failure is noted, the other parts still run
    local name=$1 at_most=$2
    shift 2
    [ "$at_most" -gt "$(left)" ] && at_most=$(left)
    echo "== $name ($SECONDS s)"
    if [ "$at_most" -lt 5 ]; then
        echo "left out: no time"
        status=1
        return
    fi
    timeout "$at_most" "$python" "$@" --json "$parts/$name.json" || { echo "$name: status $?"; status=1; }
}

"$python" benchmarks/measure.py > "$parts/environment.json" || exit 1
if grep -q '"platform": "cpu"' "$parts/environment.json"; then
    echo "no accelerator: tiny presets, interpreted kernels"
    tuning=(--dims 16 --budget 0.01) shape=tiny preset=tiny
else
    tuning=(--write) shape=13b preset=gpu
fi

{
    part tiles 120 benchmarks/tune_attention.py "${tuning[@]}" --seconds 60
    part numerics 100 benchmarks/numerics.py
    part attention 90 benchmarks/attention.py --shape "$shape" --budget 0.3 --seconds 60
    part train_step "$(left)" benchmarks/train_step.py --preset "$preset" --seconds $(($(left) - 15)) \
        --profile "$results/profile"
    "$python" benchmarks/collect.py "$parts" "$results" || status=1
    echo "== $SECONDS s, status $status"
    exit "$status"
} 2>&1 | tee "$results/gpu_check.log"
