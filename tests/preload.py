"""What every run imports, loaded once into the server that test runs are forked from."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch  # noqa: E402
from transformers import LlamaForCausalLM, Trainer  # noqa: E402, F401

import train  # noqa: E402, F401
from cwac.evaluation import evaluate  # noqa: E402, F401
from cwac.training import engine, run  # noqa: E402, F401

torch.set_num_threads(1)
