"""Small random models and a small tokenizer, so that the tests need neither hub nor artifacts."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

torch.set_num_threads(1)


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
