"""The process that holds vLLM: read requests line by line, write the tokens it generates line by line.

Started by `cwac.evaluation.vllm_engine`, in whatever Python has vLLM (https://docs.vllm.ai); it needs nothing else of
this project, so that vLLM's pins of torch and transformers need not be the project's.
"""

import json
import os
import sys


def main(folder: str, options: str) -> None:
    """folder: a saved model. options: JSON, arguments of `vllm.LLM`.

    Requests on stdin are {"prompts": [[token id]], "max_tokens": n, "stop": [token id]}, answers on stdout
    {"tokens": [[token id]]}, in the order of the prompts; first comes {"ready": <vLLM's version>}.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to stdout too
    import vllm

    engine = vllm.LLM(model=folder, seed=0, skip_tokenizer_init=True, **json.loads(options))

    def say(message: dict) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    say({"ready": vllm.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=request["max_tokens"], stop_token_ids=request["stop"], detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        outputs = engine.generate(prompts, sampling, use_tqdm=request["progress"])
        say({"tokens": [list(answer.outputs[0].token_ids) for answer in outputs]})


if __name__ == "__main__":
    main(*sys.argv[1:])
