#!/usr/bin/env bash
# Trains on several hosts with Open MPI (versions 4 and 5): one process per host with all of its GPUs.
#
#   HOSTS=node1,node2 scripts/openmpi.sh configs/flacuna_13b.yaml --mesh='{replica: 2, fsdp: 8}'
#
# The checkout and the interpreter (FLACUNA_PYTHON, default: python) must be in the same place on every host. The first
# host is the coordinator, at PORT (8476). If a process or a host fails, all restart and continue from the newest
# checkpoint (RESTARTS, see restart.sh). MPIRUN_OPTIONS are passed on to mpirun.
set -uo pipefail

if (($# == 0)) || [[ -z ${HOSTS:-} ]]; then
    echo "usage: HOSTS=node1,node2,... scripts/openmpi.sh CONFIG [--a.b=value ...]" >&2
    exit 2
fi
IFS=, read -ra hosts <<<"$HOSTS"
read -ra options <<<"${MPIRUN_OPTIONS:-}"
coordinator=${hosts[0]%%:*}:${PORT:-8476}

exec "$(dirname "$0")/restart.sh" \
    mpirun -np "${#hosts[@]}" --host "$HOSTS" "${options[@]}" \
    "${FLACUNA_PYTHON:-python}" -m flacuna_jax.train --config "$@" --distributed.coordinator="$coordinator"
