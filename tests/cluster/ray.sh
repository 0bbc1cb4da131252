#!/bin/bash
# A sweep on a Ray cluster of this machine, from PyPI's ray and hydra-ray-launcher.
#   tests/cluster/ray.sh [FOLDER]      starts it, runs the sweep, checks what is listed below, stops it
# Exit code 0 if all held, 3 where ray or the launcher is missing. PYTHON names the interpreter; FOLDER's path must be
# short, since Ray puts sockets there.
#
# Six cells on two cores: one is killed, started again by Ray and goes on; the others wait in the queue. The sweep itself
# then meets a time limit (SIGTERM) and says what is left; the same command goes on, the same cell is cancelled and named,
# and once more the same command finishes it. All six equal those of hydra/launcher=basic. Ray has no time limit
# for a task. Without a cluster the sweep is refused in one line.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
runs=$folder/runs port=${RAY_PORT:-26379}
export RAY_USAGE_STATS_ENABLED=0 RAY_ADDRESS=127.0.0.1:$port

"$python" -c 'import ray, hydra_plugins.hydra_ray_launcher' 2> /dev/null || {
    echo "no ray or no hydra-ray-launcher: pip install -e '.[ray]'" >&2
    exit 3
}

start() {
    env -u RAY_ADDRESS setsid "$python" -m ray.scripts.scripts start --head --block --num-cpus=2 --port="$port" \
        --node-ip-address=127.0.0.1 --include-dashboard=false --temp-dir="$folder/ray" > "$folder/ray.log" 2>&1 &
    cluster=$!
    trap stop EXIT
    sleep 5
    kill -0 "$cluster" 2> /dev/null || die "Ray's head did not start: $(tail -1 "$folder/ray.log")"
    wait_for "the cluster" "$python" -m ray.scripts.scripts status --address="$RAY_ADDRESS"
}
stop() { # the head and what it started, by their process group
    trap - EXIT
    end_sweeps
    kill -- "-$cluster" 2> /dev/null || true
    for _ in $(seq 20); do
        kill -0 -- "-$cluster" 2> /dev/null || return 0
        sleep 1
    done
    kill -9 -- "-$cluster" 2> /dev/null || true
}

launcher=(hydra/launcher=ray_cluster)
slowly=("+hydra.launcher.ray.init.runtime_env.env_vars.CWAC_TEST_PAUSE='$seconds'")
queued() { "$python" -m ray.scripts.scripts status --address="$RAY_ADDRESS" | grep -q 'pending tasks'; }
gone() { ! kill -0 "$1" 2> /dev/null; }

say "six cells by hydra/launcher=basic"
check "the basic launcher runs all six" sweep "$folder/basic" "$folder/basic.log" hydra/launcher=basic

start
say "the same six by Ray, a task each; the three long ones pause $seconds s a step"
become_sweep "$runs" "$folder/sweep.log" "${launcher[@]}" "${slowly[@]}" &
sweeping=$!
wait_for "cells waiting in the queue" queued
wait_for "a checkpoint of the first long cell" has_checkpoint "$runs" pause 0
worker=$(process_of "$runs" pause 0)
kill -9 "$worker"
wait_for "the first long cell going on in another process after kill -9" resumed "$runs" pause 0
check "its process is another" [ "$(process_of "$runs" pause 0)" != "$worker" ]
worker=$(process_of "$runs" pause 0)
kill -TERM "$sweeping"
if wait "$sweeping"; then die "the sweep should not exit 0 at its time limit"; else code=$?; fi
check "the sweep that met its time limit exits 143" [ "$code" = 143 ]
check "it says how many cells are left, and the command" grep -q 'interrupted: [1-5] of 6 cells are left' "$folder/sweep.log"
grep interrupted: "$folder/sweep.log"
wait_for "its tasks gone with it" gone "$worker"

say "the same command again, without a second start of a lost task"
become_sweep "$runs" "$folder/again.log" "${launcher[@]}" "${slowly[@]}" +hydra.launcher.ray.remote.max_retries=0 &
sweeping=$!
wait_for "the first long cell going on once more" resumed "$runs" pause 0 2
kill -TERM "$(process_of "$runs" pause 0)"
if wait "$sweeping"; then die "the sweep should exit 1, as a cell was cancelled"; else code=$?; fi
check "the sweep ended with exit code 1" [ "$code" = 1 ]
check "it names the cancelled cell" names "$folder/again.log" pause 0
grep '^error' "$folder/again.log"

say "the same command once more"
check "it exits 0" sweep "$runs" "$folder/last.log" "${launcher[@]}"
check "the cancelled cell resumed" resumed "$runs" pause 0 3
check "all six equal those of the basic launcher" same "$folder/basic" "$runs"
same "$folder/basic" "$runs"

stop
say "without the cluster"
if sweep "$folder/refused" "$folder/refused.log" "${launcher[@]}"; then die "was not refused"; else code=$?; fi
check "it exits 2" [ "$code" = 2 ]
check "it says what to start" grep -q '^error: hydra/launcher=ray_cluster: .*ray start --head' "$folder/refused.log"
grep '^error' "$folder/refused.log"
say "all held"
