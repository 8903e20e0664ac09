#!/usr/bin/env bash
# Trains on Cloud TPU VMs from your own machine: makes the TPU, installs, trains on all of its hosts, starts again.
#
#   TYPE=v5litepod-16 ZONE=us-west4-a scripts/tpu_vm.sh my-tpu configs/flacuna_13b_tpu.yaml \
#       --output_dir=/mnt/shared/runs/flacuna-13b
#
# SLICES=2 asks for two slices (say --mesh='{replica: 2, fsdp: 16}' then); SPOT=1 for preemptible ones. The checkout is
# copied to the hosts as it stands here. If the TPU is taken away, it is asked for again, and training continues from
# the newest checkpoint: `output_dir`, model and data must be on storage that all hosts share and that outlives them
# (SETUP is a command run on every host first, to mount it). Nothing is deleted at the end:
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

# Slices of one request are called NAME-0, NAME-1, ...; a single one has the name itself.
nodes() {
    if ((slices == 1)); then echo "$name"; else seq -f "$name-%g" 0 $((slices - 1)); fi
}

request() {
    local size=(--node-id="$name")
    ((slices == 1)) || size=(--node-count="$slices" --node-prefix="$name")
    "${tpus[@]}" queued-resources create "$name" --zone="$ZONE" --accelerator-type="$TYPE" "${size[@]}" \
        --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
}

# Waits until the TPU is there; asks for it (again) if there is none or it was taken away.
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
    on_every_host "${SETUP:-true} && cd flacuna_jax && $python -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
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
