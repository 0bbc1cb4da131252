"""Where a step's time goes: operators by self time, by part, of a step of SFT and of CWAC at SmolLM2's shape.

python -m benchmarks.profile [--tokens 512 --labels 128 --top 8] [overrides]

The models of benchmarks/steps.py; the second step of each trainer is recorded, the first allocates. A part is the
innermost marked stretch that an operator runs in; L_safety's is its forward pass, as all share one backward pass. Self
time: an operator's own, without what it calls; of kernels where there is a GPU, of the CPU's one thread else.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from analysis.tables import markdown
from benchmarks import runner, steps
from cwac.core import config
from cwac.training.engine import MethodTrainer
from experiments.cost import Row

MARK = "part: "
PARTS = ("forward", "L_safety", "backward", "optimizer", "projection", "other")


class Recorded(TrainerCallback):
    """Records the last step, and marks the parts of the step."""

    def __init__(self, trainer: MethodTrainer):
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profile = profile(activities=[ProfilerActivity.CPU, *gpu])
        marked(trainer, "compute_loss", "forward")
        marked(trainer.method, "penalty", "L_safety")
        marked(trainer.method, "after_step", "projection")
        marked(trainer.accelerator, "backward", "backward")
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        marked(optimizer, "step", "optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.profile.start()
        elif state.global_step == state.max_steps:
            self.profile.stop()


def marked(owner, name: str, part: str) -> None:
    """Mark every later call of a method of one object."""
    setattr(owner, name, record_function(MARK + part)(getattr(owner, name)))


def seconds(recorded: profile) -> Counter[tuple[str, str]]:
    """(part, operator) -> self seconds."""
    gpu, found = torch.cuda.is_available(), Counter()
    for event in recorded.events():
        if event.name.startswith(MARK) or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        found[part_of(event), event.name] += spent / 1e6
    return found


def part_of(event) -> str:
    """The innermost mark around an operator; on a GPU the backward pass runs in a thread that no mark encloses."""
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK)
        if event.name.startswith("autograd::engine::evaluate_function"):
            return "backward"
        event = event.cpu_parent
    return "other"


def measure(tokens: int, labels: int, overrides: Sequence[str]) -> dict[str, Counter[tuple[str, str]]]:
    """method -> `seconds` of its second step."""
    given, found = ["model=smollm2", "task=sst2", "train.per_device_train_batch_size=1", *overrides], {}
    for method in ("sft", "cwac"):
        with tempfile.TemporaryDirectory() as folder:
            trainer = steps.trainer(
                config.compose([*given, f"method={method}"]), Row(tokens, labels, steps.PROMPTS), 2, folder
            )
            recorded = Recorded(trainer)
            trainer.train()
        found[method] = seconds(recorded.profile)
    return found


def table(found: dict[str, Counter[tuple[str, str]]], top: int) -> str:
    """Shares of each method's own step, in percent: the parts, then the operators that take most of CWAC's step."""
    share = {m: {key: 100 * time / spent.total() for key, time in spent.items()} for m, spent in found.items()}
    rows = [
        [part, "all", *(f"{sum(s for key, s in share[m].items() if key[0] == part):.1f}" for m in found)]
        for part in PARTS
    ]
    for key, _ in found["cwac"].most_common(top):
        rows.append([*key, *(f"{share[m].get(key, 0.0):.1f}" for m in found)])
    return markdown(["part", "operator", *(f"{m}, %" for m in found)], rows, key=2, width=1000)


@config.command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = config.Parser(prog="python -m benchmarks.profile", description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="of the configuration, e.g. model.shape=...")
    parser.add_argument("--tokens", type=int, default=512, help="of the one row (%(default)s)")
    parser.add_argument("--labels", type=int, default=128, help="of them with a label (%(default)s)")
    parser.add_argument("--top", type=int, default=8, help="operators shown (%(default)s)")
    args = parser.parse_intermixed_args(argv)
    print(table(runner.quietly(lambda: measure(args.tokens, args.labels, args.overrides)), args.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
