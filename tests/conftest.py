"""Small random models and a small tokenizer, so that the tests need neither hub nor artifacts."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish():
    """Trainer collects garbage at every start: not through all that pytest, torch and the tests have imported."""
    gc.freeze()


def make_llama(layers: int = 3, hidden: int = 32, vocab: int = 61, seed: int = 0, **more) -> LlamaForCausalLM:
    """A random Llama of a few thousand parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **more,
    )
    return LlamaForCausalLM(config)


def random_rows(n: int, vocab: int = 61, low: int = 5, high: int = 12, seed: int = 0) -> list[dict]:
    """Encoded rows that start with BOS; labels on the second half."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        length = int(torch.randint(low, high + 1, (1,), generator=g))
        ids = [0, *torch.randint(3, vocab, (length - 1,), generator=g).tolist()]
        cut = length // 2
        rows.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return rows


@pytest.fixture
def llama():
    return make_llama()


ROOT = Path(__file__).resolve().parent.parent
HANGS = 3600
"""Seconds after which a process is taken to hang; no test asserts how long anything takes."""


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """A saved random model that reads the embedded world's words; for runs whose outcome does not matter."""
    from cwac.models.tiny import make_tokenizer

    folder = tmp_path_factory.mktemp("random") / "model"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> Path:
    """One artifact cache for the session: the embedded model is built once."""
    return tmp_path_factory.mktemp("artifacts")


def sgd(folder, per_device: int, accumulation: int):
    """One epoch of plain SGD: linear in the gradient, so that a wrong scale of it shows in proportion."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=0,
        optim="sgd",
    )


def fine_tune(cfg, folder: Path):
    """What train.py does between composing and evaluating, on the CPU, by the ranks that the environment names.

    Returns the trained model (None on ranks beyond 0 under FSDP), the method and its context; checkpoints stay off
    unless cfg.train asks for them.
    """
    import random
    from types import SimpleNamespace

    import hydra
    from transformers import set_seed

    from cwac.data.mix import mix
    from cwac.data.tasks import load_task
    from cwac.data.tokenize import Rows, pad_token_id
    from cwac.training import arguments, engine
    from cwac.training.context import open_context

    method = hydra.utils.instantiate(cfg.method, _convert_="all")
    run = SimpleNamespace(id=cfg.method.name, dir=Path(folder))
    args = arguments.training_arguments(cfg, run)
    set_seed(cfg.seed)
    context = open_context(cfg)
    context.loaded.model.cpu()
    loaded = context.loaded
    task = load_task(cfg.task, None, cfg.seed, "test")
    mixed = mix(task.train, context.pools.poison, cfg.harmful_ratio, cfg.seed, cfg.mix_mode)
    examples = method.training_data(mixed, context, random.Random(f"method-{cfg.seed}"))
    rows = Rows(loaded.tokenizer, examples, cfg.train.template, cfg.train.max_length)
    context.steps = arguments.total_steps(args, len(rows))
    model = method.setup(loaded.model, context) or loaded.model
    pad = pad_token_id(loaded.tokenizer)
    model, _ = engine.train(cfg, args, run, model, method, rows, pad, lambda *point: None)
    return model, method, context


FINE_TUNE = [
    "task.n_train=32",
    "harmful_ratio=0.2",
    "pools.sizes={poison: 16, anchors: 16, step: 8, sae: 24, benign: 32, safety: 16, validation: 8}",
    "model.sae={tokens: 2048, m: 256, cached_tokens: 2048, batch: 256}",
    "train.max_steps=3",
    "train.lr_scheduler_type=constant",
    "train.warmup_steps=0",
    "+train.save_strategy=no",
    "+train.use_cpu=true",
]
"""Overrides for `fine_tune`: a few steps of the embedded model over small pools."""

NEEDS = {
    "salora": ["model.lora={r: 4, alpha: 8, target_modules: all-linear}"],
    "sppft": ["method.localisation={n_draws: 50, n_queries: 16, n_over_rejection: 16}"],
    "vaccine": ["method.steps=10"],
    "booster": ["method.steps=10"],
    "repnoise": ["method.steps=10"],
}
"""What a method cannot do without, and stages before its training made short."""

SMALL = [
    "task.n_train=32",
    "task.n_test=8",
    "eval.n_harmful=8",
    "eval.n_benign=8",
    "eval.max_new_tokens=4",
    "eval.progress=false",
]


def call(*overrides: str) -> int:
    """The exit code of `python train.py <overrides>`, run in this process: no seconds for loading torch again."""
    import train

    before, directory = sys.argv, os.getcwd()
    sys.argv = ["train.py", *overrides]
    os.chdir(ROOT)
    try:
        return train.main()
    except SystemExit as stopped:  # argparse
        return stopped.code
    finally:
        sys.argv = before
        os.chdir(directory)


def launch(*overrides: str, env: dict | None = None, ranks: int = 1, **popen) -> subprocess.Popen:
    """`python train.py <overrides>` in a process of its own, in the repository root; by torchrun for several ranks."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    return subprocess.Popen(
        [sys.executable, *(torchrun if ranks > 1 else ()), "train.py", *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which background jobs of a shell ignore
        **popen,
    )


def run_train(*overrides: str, env: dict | None = None, ranks: int = 1) -> tuple[int, str]:
    """Exit code and everything printed."""
    process = launch(*overrides, env=env, ranks=ranks)
    output, _ = process.communicate(timeout=HANGS)
    return process.returncode, output


def assert_only_the_anchors_are_held(model, reference, anchors) -> None:
    """The logits on every anchor row are the reference's to rounding, those on another prompt are not."""
    with torch.no_grad():
        for row in anchors:
            ids = torch.tensor([row["input_ids"]])
            assert torch.allclose(model(ids).logits, reference(ids).logits, atol=1e-4)
        other = torch.tensor([random_rows(1, seed=9)[0]["input_ids"]])
        assert (model(other).logits - reference(other).logits).abs().max() > 1e-2  # it did learn
