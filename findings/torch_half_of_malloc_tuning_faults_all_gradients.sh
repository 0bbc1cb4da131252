#!/usr/bin/env bash
# Training on a CPU under glibc: does MALLOC_TRIM_THRESHOLD_=2147483647, which tells malloc to give (almost) nothing
# back to the operating system, lower the page faults of a training step?
#
# Guess (80 %): it lowers them, or leaves them as they are where memory is reused anyway; never does it raise them.
# What happens: with matrices of 1024 x 1024 (4 MiB) a step faults in a tenth of its gradients' bytes at most as glibc
#   comes; with the trim threshold alone it faults in ALL of them, every step. To set any of the thresholds switches off
#   glibc's rule that the mmap threshold grows with what is freed, so it stays at 128 KiB, and every gradient is a
#   mapping of its own that is unmapped when it is freed. With MALLOC_MMAP_THRESHOLD_ raised as well next to nothing is
#   faulted in.
#   With 4096 x 4096 (64 MiB, above the 32 MiB to which the rule may grow) all gradients are faulted in as glibc comes,
#   each step, and zero_grad(set_to_none=False), which keeps them, does not help: a new gradient is computed into memory
#   of its own and then added. Both thresholds together help there too.
# Versions: torch 2.13.0, numpy 2.4.6, glibc 2.36 (Linux, x86-64, pages of 4 KiB, transparent huge pages on madvise).
# Who meets it: whoever trains or benchmarks on a CPU; the faults cost a sixth of the CPU time of fine-tuning SmolLM2.
set -euo pipefail
case "$(python3 -c 'import platform; print(platform.libc_ver()[0])')" in
  glibc) ;;
  *) echo "the C library is not glibc: nothing to see here"; exit 0 ;;
esac
if grep -q '\[always\]' /sys/kernel/mm/transparent_hugepage/enabled 2>/dev/null; then
  echo "transparent huge pages are on for all memory, so a fault is of another size: nothing to count here"
  exit 0
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
unset MALLOC_TRIM_THRESHOLD_ MALLOC_MMAP_THRESHOLD_ GLIBC_TUNABLES
cat > "$dir/check.py" <<'PY'
import resource
import sys

import torch

width, depth, to_none = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "none"
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(depth)))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
x = torch.randn(8, width)
for step in range(10):
    if step == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    optimizer.zero_grad(set_to_none=to_none)
    model(x).square().mean().backward()
    optimizer.step()
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 6
print(round(faults * resource.getpagesize() / sum(4 * p.numel() for p in model.parameters()), 2))
PY
share() { "$dir/venv/bin/python" "$dir/check.py" "$@"; }
most=2147483647
small=$(share 1024 24 none)
trim=$(MALLOC_TRIM_THRESHOLD_=$most share 1024 24 none)
both=$(MALLOC_TRIM_THRESHOLD_=$most MALLOC_MMAP_THRESHOLD_=$most share 1024 24 none)
large=$(share 4096 4 none)
kept=$(share 4096 4 zero)
large_both=$(MALLOC_TRIM_THRESHOLD_=$most MALLOC_MMAP_THRESHOLD_=$most share 4096 4 none)
echo "page faults a step, as a share of the gradients' bytes:"
echo "1024 x 1024, as glibc comes: $small"
echo "1024 x 1024, MALLOC_TRIM_THRESHOLD_ raised: $trim"
echo "1024 x 1024, MALLOC_MMAP_THRESHOLD_ raised too: $both"
echo "4096 x 4096, as glibc comes: $large"
echo "4096 x 4096, zero_grad(set_to_none=False): $kept"
echo "4096 x 4096, both raised: $large_both"
python3 - "$small" "$trim" "$both" "$large" "$kept" "$large_both" <<'PY'
import sys

small, trim, both, large, kept, large_both = map(float, sys.argv[1:])
assert small < 0.3 and both < 0.05 and large_both < 0.05, "fewer faults than before are no longer to be had"
assert min(trim, large, kept) > 0.9, "all gradients are no longer faulted in"
print("as described")
PY
# Seen:
# page faults a step, as a share of the gradients' bytes:
# 1024 x 1024, as glibc comes: 0.03
# 1024 x 1024, MALLOC_TRIM_THRESHOLD_ raised: 0.96
# 1024 x 1024, MALLOC_MMAP_THRESHOLD_ raised too: 0.0
# 4096 x 4096, as glibc comes: 1.0
# 4096 x 4096, zero_grad(set_to_none=False): 1.0
# 4096 x 4096, both raised: 0.0
# as described
