#!/usr/bin/env bash
# Hydra: what does a command line do that chooses from one config group twice, `method=a method=b`?
#
# Guess (60 %): an error, as `defaults` lists give one for a group that appears twice.
# What happens: the last choice wins without a word. In a sweep even a whole list is swallowed: `-m method=a,b,c
#   method=b` runs one job instead of three. Only the form with a plus, `method=a +method=b`, is refused.
# Versions: hydra-core 1.3.8, omegaconf 2.3.1.
# Who meets it: a wrapper script that appends "$@" to a sweep of its own. The user's `method=b` replaces the script's
#   list, and a campaign of 3 cells ends after one, with exit code 0.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile hydra-core==1.3.8 omegaconf==2.3.1
mkdir -p "$dir/conf/method"
for name in a b c; do echo "name: $name" > "$dir/conf/method/$name.yaml"; done
printf 'defaults:\n  - method: a\n  - _self_\n' > "$dir/conf/config.yaml"
cat > "$dir/app.py" <<'PY'
import hydra


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def app(cfg):
    print("ran", cfg.method.name)


app()
PY
cd "$dir"
ran() { venv/bin/python app.py "$@" 2>&1 | sed -n 's/^ran //p' | paste -sd' '; }
once=$(ran method=a method=b)
swept=$(ran -m method=a,b,c method=b)
alone=$(ran -m method=a,b,c)
echo "method=a method=b          ran: $once"
echo "-m method=a,b,c            ran: $alone"
echo "-m method=a,b,c method=b   ran: $swept"
[ "$once" = b ] && [ "$alone" = "a b c" ] && [ "$swept" = b ]
if venv/bin/python app.py method=a +method=b > plus.txt 2>&1; then exit 1; fi
grep -m1 "more than once" plus.txt
echo "observed as described"
