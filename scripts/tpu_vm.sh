#!/usr/bin/env bash
# Trains on Cloud TPU VMs from your own machine: creates the TPU, installs, trains on all of its hosts, and restarts.
#
#   TYPE=v5litepod-16 ZONE=us-west4-a scripts/tpu_vm.sh my-tpu configs/flacuna_13b_tpu.yaml \
#       --output_dir=/mnt/shared/runs/flacuna-13b
#
# SLICES=2 requests two slices (then set --mesh='{replica: 2, fsdp: 16}'), SPOT=1 preemptible ones. The checkout is copied
# to the hosts unchanged. If the TPU is preempted, it is requested again, and training continues from the newest
# checkpoint. Therefore `output_dir`, model and data must be on persistent storage that all hosts share (SETUP is a
# command that runs first on every host, to mount it). Nothing is deleted at the end:
#   gcloud compute tpus queued-resources delete my-tpu --zone=ZONE --force
set -uo pipefail

if (($# < 2)) || [[ -z ${TYPE:-} || -z ${ZONE:-} ]]; then
    echo "usage: TYPE=v5litepod-16 ZONE=... scripts/tpu_vm.sh NAME CONFIG [--a.b=value ...]" >&2
    exit 2
fi
name=$1
shift
slices=${SLICES:-1}
root=$(cd "$(dirname "$0")/.." && pwd)
tpus=(gcloud compute tpus)

state() {
    "${tpus[@]}" queued-resources describe "$name" --zone="$ZONE" --format='value(state.state)' 2>/dev/null
}

# The slices of a request are named NAME-0, NAME-1, ...; a single slice is named NAME.
nodes() {
    if ((slices == 1)); then echo "$name"; else seq -f "$name-%g" 0 $((slices - 1)); fi
}

request() {
    local size=(--node-id="$name")
    ((slices == 1)) || size=(--node-count="$slices" --node-prefix="$name")
    "${tpus[@]}" queued-resources create "$name" --zone="$ZONE" --accelerator-type="$TYPE" "${size[@]}" \
        --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
}

# Waits until the TPU is ready; requests it (again) if it does not exist or was preempted.
obtain() {
    while :; do
        case $(state) in
        ACTIVE) return ;;
        "") request || return ;;
        SUSPENDED | FAILED) "${tpus[@]}" queued-resources delete "$name" --zone="$ZONE" --force --quiet || return ;;
        *) sleep "${POLL:-30}" ;;
        esac
    done
}

on_every_host() {
    local node pids=() worst=0 status pid
    for node in $(nodes); do
        "${tpus[@]}" tpu-vm ssh "$node" --zone="$ZONE" --worker=all --command="$1" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid"
        status=$?
        ((status == 0)) || worst=$status
    done
    return "$worst"
}

install() { # with the newest Python that the hosts have
    local node
    local python='$(for v in python3.13 python3.12 python3.11 python3; do "$v" -V >/dev/null 2>&1 && echo "$v" && break; done)'
    for node in $(nodes); do
        "${tpus[@]}" tpu-vm scp --recurse "$root" "$node:flacuna_jax" --zone="$ZONE" --worker=all || return
    done
    on_every_host "${SETUP:-true} && cd flacuna_jax && $python -m venv .venv && .venv/bin/pip install -q -e '.[tpu,hub]'"
}

printf -v arguments ' %q' "$@"
for ((attempt = 0; attempt <= ${RESTARTS:-50}; attempt++)); do
    obtain && install && on_every_host "cd flacuna_jax && .venv/bin/python -m flacuna_jax.train --config$arguments"
    status=$?
    [[ $status == 0 || $status == 2 ]] && exit "$status"
    echo "tpu_vm.sh: status $status; the TPU is $(state); once more" >&2
    sleep "${PAUSE:-30}"
done
exit "$status"
