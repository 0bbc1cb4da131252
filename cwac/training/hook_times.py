"""What a method's hooks take of a training step, measured on the training itself.

It is measured since it cannot be known before: hooks change the model, so they cannot be tried, and what they compute
is the method's own affair. experiments/cost.py counts the FLOPs of a step beforehand, from a model's shape.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from cwac.methods.base import HOOKS, Method, overridden

clock = time.perf_counter


class HookTimes:
    """How the time of a training's first steps divides between the method's hooks and all else.

    Step 1 is left out, since it also allocates memory, and `TIMED` steps after it are timed. On CUDA the times are
    those of the device: events are recorded in its stream, and nothing waits for it before `summary`.
    """

    TIMED = 10

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.done = 0
        """Optimizer steps that this process has made."""
        self.hooks: list[tuple[str, Any, Any]] = []
        """Hook, and the moments at which it began and ended."""
        self.steps: list[tuple[Any, Any]] = []
        self.began: Any = None

    @property
    def is_open(self) -> bool:
        """Whether the present step is one of those that are timed."""
        return 1 <= self.done <= self.TIMED

    def now(self) -> Any:
        """This moment: seconds, or an event of the CUDA stream."""
        if not self.on_cuda:
            return clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one moment to another."""
        return begin.elapsed_time(end) / 1000 if self.on_cuda else end - begin

    @contextlib.contextmanager
    def of(self, hook: str) -> Iterator[None]:
        """Time what runs in this context as part of a hook."""
        if not self.is_open:
            yield
            return
        begin = self.now()
        yield
        self.hooks.append((hook, begin, self.now()))

    def of_backward(self, hook: str, total: torch.Tensor, task: torch.Tensor) -> None:
        """Time the penalty's part of the backward pass of `total`, which is the loss `task` plus a penalty.

        Autograd goes through what was computed last first: through the whole of the penalty, then the task's loss.
        """
        if not self.is_open or task.grad_fn is None:
            return
        begin: list[Any] = []
        total.grad_fn.register_prehook(lambda _: begin.append(self.now()))
        task.grad_fn.register_prehook(lambda _: self.hooks.append((hook, begin.pop(), self.now())))

    def begin_step(self) -> None:
        self.began = self.now() if self.is_open else None

    def end_step(self) -> bool:
        """Count a step; True after the last one that is timed."""
        if self.began is not None:
            self.steps.append((self.began, self.now()))
        self.done += 1
        return self.done == self.TIMED + 1

    def summary(self, method: Method) -> str:
        """The line for the user; empty where the method has no hook at a step, or no step was timed."""
        if not self.steps or not overridden(method):
            return ""
        if self.on_cuda:
            self.steps[-1][1].synchronize()
        seconds = dict.fromkeys(HOOKS, 0.0)
        for hook, begin, end in self.hooks:
            seconds[hook] += self.between(begin, end)
        # a batch is drawn before Trainer says that a step begins
        total = sum(self.between(*moments) for moments in self.steps) + seconds["batch"]
        hooks = sum(seconds.values())
        times = f"{total / (total - hooks):.2f}"
        parts = ", ".join(f"{hook} {100 * seconds[hook] / total:.1f} %" for hook in overridden(method))
        return (
            f"method={method.name}: a step takes {times} times what it takes without the method's hooks, measured "
            f"over {len(self.steps)} step{'s' * (len(self.steps) > 1)} (of a step's time: {parts})"
        )
