#!/bin/bash
# A sweep on a SLURM of one node on this machine, from Debian's packages slurm-wlm and munge; needs root.
#   tests/cluster/slurm.sh [FOLDER]         starts it, runs the sweep, checks what is listed below, stops it
#   tests/cluster/slurm.sh start FOLDER     munged, slurmctld and slurmd, with their files in FOLDER; prints SLURM_CONF
#   tests/cluster/slurm.sh stop FOLDER      ends those, and only those
# No accounting (sacct is off), no cgroups: a container can run it. A stopped job is requeued (JobRequeue).
# Exit code 0 if all held, 3 where the services or hydra-submitit-launcher are missing. PYTHON names the interpreter.
#
# Six cells on two cores: one is killed, one cancelled, one meets its time limit, is requeued and goes on; the others wait
# in the queue. The sweep ends, names the two that are lost, and the same command goes on with them. All six equal those of
# hydra/launcher=basic. A sweep longer than an array may be is refused in one line.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
limit=${LIMIT_MINUTES:-2}

stop() {
    end_sweeps
    for name in slurmd slurmctld munged; do
        [ -f "$folder/$name.pid" ] && kill "$(cat "$folder/$name.pid")" 2> /dev/null || true
    done
}

start() {
    for needed in munged slurmctld slurmd sinfo; do
        command -v "$needed" > /dev/null || { echo "no $needed: apt-get install slurm-wlm munge" >&2; exit 3; }
    done
    [ "$(id -u)" = 0 ] || { echo "slurmd starts jobs for others, which needs root" >&2; exit 3; }
    mkdir -p "$folder"/{state,spool,munge}
    chmod 700 "$folder/munge"
    head -c 1024 /dev/urandom > "$folder/munge/key"
    chmod 400 "$folder/munge/key"
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    local node memory cores
    node=$(hostname -s) cores=$(env -u OMP_NUM_THREADS nproc)
    memory=$(awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
    cat > "$folder/slurm.conf" << CONF
ClusterName=one
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmctldPort=${SLURMCTLD_PORT:-16817}
SlurmdPort=${SLURMD_PORT:-16818}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=5
MaxArraySize=7
MessageTimeout=60
SlurmdTimeout=300
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=$node Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -c
    slurmd -N "$node"
    for _ in $(seq 60); do
        if sinfo --noheader --format=%T 2> /dev/null | grep -q idle; then
            echo "$SLURM_CONF"
            return
        fi
        sleep 1
    done
    echo "the node did not become idle; see $folder/slurmctld.log and $folder/slurmd.log" >&2
    tail -5 "$folder"/*.log >&2
    stop
    exit 4
}

slurm=(hydra/launcher=slurm hydra.launcher.gpus_per_node=null hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=1)
states() { squeue --noheader --array --states=all --jobs="$1" --format='%i %T %r'; }
is() { states "$1" | grep -q "^$1 $2"; }                   # is JOB STATE
waiting() { [ "$(states "$1" | grep -c ' PENDING ')" -ge "$2" ]; }

scenarios() {
    local runs=$folder/runs log=$folder/sweep.log job
    "$python" -c 'import hydra_plugins.hydra_submitit_launcher' 2> /dev/null || {
        echo "no hydra-submitit-launcher: pip install -e '.[slurm]'" >&2
        exit 3
    }
    start
    trap stop EXIT
    say "six cells by hydra/launcher=basic"
    check "the basic launcher runs all six" sweep "$folder/basic" "$folder/basic.log" hydra/launcher=basic

    say "the same six by SLURM, a job each, time limit $limit min; the three long ones pause $seconds s a step"
    CWAC_TEST_PAUSE=$seconds become_sweep "$runs" "$log" "${slurm[@]}" hydra.launcher.timeout_min="$limit" \
        hydra.launcher.signal_delay_s=5 &
    local launcher=$!
    wait_for "the sweep's jobs" grep -q "as job" "$log"
    job=$(sed -n 's/.*cells as job \([0-9]*\).*/\1/p' "$log")
    wait_for "4 of 6 cells waiting in the queue" waiting "$job" 4
    wait_for "a checkpoint of the first long cell, job ${job}_1" has_checkpoint "$runs" pause 0
    kill -9 "$(process_of "$runs" pause 0)"
    wait_for "job ${job}_1 FAILED after kill -9" is "${job}_1" FAILED
    wait_for "a checkpoint of the second long cell, job ${job}_3" has_checkpoint "$runs" pause 1
    scancel "${job}_3"
    wait_for "job ${job}_3 CANCELLED after scancel" is "${job}_3" CANCELLED
    wait_for "job ${job}_5 running" is "${job}_5" RUNNING
    wait_for "job ${job}_5 requeued at its time limit" is "${job}_5" PENDING
    if wait "$launcher"; then die "the sweep should exit 1, as two cells are lost"; else code=$?; fi
    check "the sweep ended with exit code 1" [ "$code" = 1 ]
    check "it says that 2 cells failed" number_failed "$log" 2
    check "it names the killed cell" names "$log" pause 0
    check "it names the cancelled cell" names "$log" pause 1
    check "the cell that met its time limit resumed" resumed "$runs" pause 2
    check "no call of sacct failed, as none is made" bash -c "! grep -qi sacct '$log'"
    grep -E '^error' "$log"

    say "the same command again"
    check "it exits 0" sweep "$runs" "$folder/again.log" "${slurm[@]}"
    check "the four finished cells had nothing to do" bash -c \
        "[ \$(grep -l 'nothing to do' '$runs'/.submitit/*/*_log.out | wc -l) = 4 ]"
    check "the killed cell resumed" resumed "$runs" pause 0
    check "the cancelled cell resumed" resumed "$runs" pause 1
    check "all six equal those of the basic launcher" same "$folder/basic" "$runs"
    same "$folder/basic" "$runs"

    say "twelve cells, where an array may have $(sed -n 's/^MaxArraySize=//p' "$folder/slurm.conf")"
    if sweep "$folder/refused" "$folder/refused.log" "${slurm[@]}" seed=0,1,2,3,4,5; then die "was not refused"; else code=$?; fi
    check "it exits 2 with SLURM's reason" grep -q "^error: SLURM refused the sweep's 12 jobs: .*[Ii]nvalid job array" \
        "$folder/refused.log"
    check "that is exit code 2" [ "$code" = 2 ]
    grep '^error' "$folder/refused.log"
    check "nothing is left in the queue" [ -z "$(squeue --noheader)" ]
    say "all held"
}

case ${1:-} in
    start | stop)
        folder=${2:?a folder}
        "$1"
        ;;
    *)
        folder=${1:-$(mktemp -d)}
        mkdir -p "$folder"
        scenarios
        ;;
esac
