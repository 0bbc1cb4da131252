#!/usr/bin/env bash
# accelerate: do load_state and skip_first_batches continue an epoch with the rows that the uninterrupted run would see?
#
# Guess (75 %): yes; save_state keeps the random states and, with use_seedable_sampler, the sampler, for this very purpose.
# What happens: no, with either sampler. By default the restored random state is that of the interruption and the epoch's
#   order was drawn before it, so the resumed epoch is shuffled anew: rows come twice, others never. With
#   use_seedable_sampler a new process counts epochs from 0 again: epoch 1 goes on in epoch 0's order, and epoch 2 has that
#   order once more. set_epoch(epoch) before skip_first_batches mends the second case, not the first.
# Versions: accelerate 1.15.0, torch 2.13.0.
# Who meets it: training loops of one's own that resume within an epoch. Nothing is said, the number of steps is right, and
#   the model has seen some rows twice as often as others. The transformers Trainer resumes exactly.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 accelerate==1.15.0
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error WANDB_MODE=disabled OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import multiprocessing

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, STOP = 3, (1, 1)  # the run ends after batch 1 of epoch 1, and goes on with batch 2


def train(seen, seedable, until=None, resume=False, set_epoch=False):
    set_seed(0)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable))
    model = torch.nn.Linear(1, 1)
    loader = DataLoader(TensorDataset(torch.arange(8.0)[:, None]), batch_size=2, shuffle=True)
    model, loader = accelerator.prepare(model, loader)
    first, skip = (STOP[0], STOP[1] + 1) if resume else (0, 0)
    if resume:
        accelerator.load_state("state")
    for epoch in range(first, EPOCHS):
        if set_epoch:
            loader.set_epoch(epoch)
        skipped = skip if epoch == first else 0
        batches = accelerator.skip_first_batches(loader, skipped) if skipped else loader
        for i, (rows,) in enumerate(batches, skipped):
            seen.put((epoch, rows[:, 0].int().tolist()))
            if (epoch, i) == until:
                accelerator.save_state("state")
                return seen.put(None)
    seen.put(None)


def run(**options):
    """The rows of each epoch, in order, as a process of its own sees them."""
    context = multiprocessing.get_context("fork")
    seen = context.Queue()
    process = context.Process(target=train, args=(seen,), kwargs=options)
    process.start()
    epochs = [[] for _ in range(EPOCHS)]
    while (item := seen.get(timeout=200)) is not None:
        epochs[item[0]] += item[1]
    process.join()
    return epochs


for seedable in (False, True):
    whole = run(seedable=seedable)
    before = run(seedable=seedable, until=STOP)
    after = run(seedable=seedable, resume=True)
    print(f"use_seedable_sampler={seedable}: epochs of the uninterrupted run {whole}")
    print(f"    epoch 1 interrupted and resumed: {before[1]} and {after[1]}, epoch 2: {after[2]}")
    assert before[0] == whole[0] and before[1] == whole[1][:4]
    assert sorted(whole[1]) == list(range(8)) and sorted(before[1] + after[1]) != list(range(8)), "rows twice, rows never"
    if seedable:
        assert after[1] == whole[0][4:] and after[2] == whole[0], "the order of epoch 0, both times"
        mended = run(seedable=seedable, resume=True, set_epoch=True)
        print(f"    with set_epoch: {mended[1]}, epoch 2: {mended[2]}")
        assert mended[1] == whole[1][4:] and mended[2] == whole[2]
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
