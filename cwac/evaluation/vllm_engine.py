"""Generation by vLLM (Kwon et al. 2023, arXiv:2309.06180), `eval.engine=vllm`: the same answers' files, made faster.

Greedy like `cwac.models.generate`, on the same token ids; only rounding differs, so an answer may part from the
other engine's where two tokens are about as likely. An evaluation carries its engine in its hash.

vLLM runs in a process of its own, on the weights of the moment, saved to a temporary folder; meanwhile a model on a
GPU waits in the host's memory, since vLLM takes its share of the card at once.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cwac.core import distributed
from cwac.core.errors import UserError
from cwac.data.examples import Messages
from cwac.data.tokenize import encode_opening, encode_prompt, stop_tokens

WORKER = Path(__file__).parent / "vllm_worker.py"
TAIL = 12
"""Lines of vLLM's own output that are shown where none of them names an error."""


class VllmEngine:
    """A context: while it is open, `generate` answers with the model's weights as they were at the start.

    python: an interpreter with vLLM; None for this one. options: arguments of `vllm.LLM`, e.g.
    `gpu_memory_utilization`. Raises UserError, on opening, where vLLM does not start or several processes train.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        python: str | None = None,
        options: Mapping | None = None,
    ):
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.command = [python or sys.executable, str(WORKER)]
        self.options = dict(options or {})

    def __enter__(self) -> VllmEngine:
        if distributed.world_size() > 1:
            raise UserError("eval.engine=vllm serves one process; with several use eval.engine=hf")
        self._folder = tempfile.TemporaryDirectory(prefix="cwac-vllm-")
        self._log = tempfile.TemporaryFile("w+")
        self._process = None
        try:
            self.model.to("cpu")
            plain = self.model
            if hasattr(plain, "merge_and_unload"):  # a copy: merging and taking out again would round the weights
                plain = copy.deepcopy(plain).merge_and_unload()
            plain.save_pretrained(self._folder.name)
            command = [*self.command, self._folder.name, json.dumps(self.options)]
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
                )
            except OSError as error:
                raise UserError(f"eval.vllm.python={self.command[0]} does not start ({error.strerror})") from error
            self._ask(None)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error) -> None:
        if self._process is not None:
            self._process.stdin.close()  # the worker's loop ends, and with it vLLM's own processes
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
        self._folder.cleanup()
        self._log.close()
        self.model.to(self.device)

    def generate(
        self,
        prompts: Sequence[Messages],
        *,
        template: str = "chat",
        prefill: str | None = None,
        max_new_tokens: int = 64,
        description: str | None = "generating",
    ) -> list[str]:
        """As `cwac.models.generate.generate`, whose arguments these are."""
        opening = encode_opening(self.tokenizer, prefill) if prefill else []
        request = {
            "prompts": [encode_prompt(self.tokenizer, p, template) + opening for p in prompts],
            "max_tokens": max_new_tokens,
            "stop": stop_tokens(self.model, self.tokenizer, template),
            "progress": description is not None,
        }
        answers = self._ask(request)["tokens"]
        texts = self.tokenizer.batch_decode([opening + ids for ids in answers], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _ask(self, request: dict | None) -> dict:
        """The worker's next line, after a request if there is one. Raises UserError where it has ended."""
        try:
            if request is not None:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        self._log.seek(0)
        said = self._log.read()
        if "No module named 'vllm'" in said:
            raise UserError(
                f"eval.engine=vllm: {self.command[0]} has no vLLM; install it (pip install vllm), in another "
                "environment if its pins do not fit, named by eval.vllm.python=<its python>, or use eval.engine=hf"
            )
        # its processes each end with an error of their own; the first is the cause
        errors = dict.fromkeys(re.findall(r"^(?!.*WARNING).*?(\w+(?:Error|Exception): .+)", said, re.M))
        raise UserError("eval.engine=vllm: vLLM ended; " + "\n".join([*errors] or said.splitlines()[-TAIL:]))
