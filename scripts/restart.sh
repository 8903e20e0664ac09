#!/usr/bin/env bash
# Runs a command and restarts it until it succeeds: after a preemption, the loss of a host, or a crash.
#
#   scripts/restart.sh flacuna train --config configs/flacuna_13b.yaml
#
# Every start continues from the newest checkpoint. Exits with the command's status if that is 0 (done) or 2 (the input
# is wrong, so a restart would not help), after RESTARTS restarts (20), or when it receives SIGTERM or SIGINT; then the
# command receives the signal too, and can save before it ends.
set -uo pipefail

restarts=${RESTARTS:-20}
pause=${RESTART_PAUSE:-10}
stopping=

forward() {
    stopping=$1
    kill -s "$1" "$child" 2>/dev/null
}
trap 'forward TERM' TERM
trap 'forward INT' INT

for ((attempt = 0; ; attempt++)); do
    "$@" &
    child=$!
    # A trapped signal ends `wait` early: continue waiting until the command itself has ended.
    while :; do
        wait "$child"
        status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    if [[ -n $stopping || $status == 0 || $status == 2 ]]; then
        exit "$status"
    fi
    if ((attempt >= restarts)); then
        echo "restart.sh: status $status, and no restart is left of $restarts" >&2
        exit "$status"
    fi
    echo "restart.sh: status $status; restart $((attempt + 1)) of $restarts in $pause s" >&2
    sleep "$pause" &
    wait $!
    [[ -z $stopping ]] || exit "$status"
done
