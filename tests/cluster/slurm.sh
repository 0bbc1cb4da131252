#!/bin/bash
# A SLURM of one node on this machine, from Debian's packages slurm-wlm and munge; needs root.
#   tests/cluster/slurm.sh start FOLDER     munged, slurmctld and slurmd, with their files in FOLDER; prints SLURM_CONF
#   tests/cluster/slurm.sh stop FOLDER      ends those, and only those
# No accounting (sacct is off), no cgroups: a container can run it. A stopped job is requeued (JobRequeue).
set -euo pipefail
action=${1:?start or stop} folder=${2:?a folder}

stop() {
    for name in slurmd slurmctld munged; do
        [ -f "$folder/$name.pid" ] && kill "$(cat "$folder/$name.pid")" 2> /dev/null || true
    done
}

start() {
    for needed in munged slurmctld slurmd sinfo; do
        command -v "$needed" > /dev/null || { echo "no $needed: apt-get install slurm-wlm munge" >&2; exit 3; }
    done
    mkdir -p "$folder"/{state,spool,munge}
    chmod 700 "$folder/munge"
    head -c 1024 /dev/urandom > "$folder/munge/key"
    chmod 400 "$folder/munge/key"
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    local node memory
    node=$(hostname -s)
    memory=$(awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
    cat > "$folder/slurm.conf" << CONF
ClusterName=one
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmctldPort=${SLURMCTLD_PORT:-16817}
SlurmdPort=${SLURMD_PORT:-16818}
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
MessageTimeout=60
SlurmdTimeout=300
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
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

"$action"
