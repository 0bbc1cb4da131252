# What slurm.sh and ray.sh share: the sweep, what they wait for, and what they check. To be sourced.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 CWAC_TEST_PAUSE=0
seconds=${SECONDS_A_STEP:-2.5}   # of the long cells where they are to be met while they train
patience=${PATIENCE:-1800}       # seconds after which what is waited for is taken not to come

# Six cells of the embedded model: three of SFT, three of an SFT that can be made to last (tests/pausing.py).
cells=(model=tiny seed=0,1,2 method=sft,pause harmful_ratio=0.1 train.max_steps=50 train.save_steps=5
       task.n_train=64 eval.n_task=16 eval.n_harmful=16 eval.n_benign=8 eval.max_new_tokens=8
       eval.progress=false eval.drift=false 'hydra.searchpath=[file://tests/conf]')

say() { echo "[$(date +%T)] $*"; }
die() { say "FAILED: $*" >&2; exit 1; }
check() { # check WHAT COMMAND...: the command must succeed
    local what=$1
    shift
    "$@" > /dev/null || die "$what"
    say "ok: $what"
}
wait_for() { # wait_for WHAT COMMAND...: until the command succeeds
    local what=$1 waited=0
    shift
    until "$@" > /dev/null 2>&1; do
        ((waited += 1))
        ((waited < patience)) || die "waited $patience s for $what"
        sleep 1
    done
    say "seen: $what"
}
become_sweep() { # become_sweep RUNS LOG ARGUMENTS...: the shell becomes the sweep, so that `&` gives the sweep's own pid
    local runs=$1 log=$2
    shift 2
    cd "$root"
    exec "$python" train.py -m "${cells[@]}" "paths.runs=$runs" "paths.artifacts=$folder/artifacts" "$@" > "$log" 2>&1
}
sweep() { (become_sweep "$@"); } # exit code of the sweep
end_sweeps() { jobs -pr | xargs -r kill 2> /dev/null || true; }
run_of() { ls -d "$1"/*-"$2"-s"$3"-* 2> /dev/null; }                            # run_of RUNS METHOD SEED
has_checkpoint() { ls "$(run_of "$1" "$2" "$3")"/checkpoint-*/complete.json; }
process_of() { sed -n 's/.*"pid": \([0-9]*\).*/\1/p' "$(run_of "$1" "$2" "$3")/status.json"; }
names() { grep '^error:' "$1" | grep -q -- "seed=$3 method=$2"; }               # names LOG METHOD SEED
number_failed() { grep -q "^error: $2 cells failed" "$1"; }
resumed() { [ "$(grep -c 'goes on from step' "$(run_of "$1" "$2" "$3")/train.log")" -ge "${4:-1}" ]; } # ... TIMES
same() { "$python" "$root/tests/cluster/same_results.py" "$1" "$2"; }           # same RUNS RUNS
