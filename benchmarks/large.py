"""The table at Llama-2-7B's shape on one GPU of 80 GB: step, constraint, subspace, SAE, L_safety.

python -m benchmarks.large [--out benchmarks/large.json --parts step,sae --seconds 150]      on an NVIDIA H100 80 GB
python -m benchmarks.large --shape tiny --cpu                                                in miniature, anywhere

For a machine that is lent for minutes: parts in the order of their value, each row written as soon as it is measured,
a part that fails named in one line while the others go on, and none begun that the `--seconds` left cannot hold.
Weights, rows and activations are random; CWAC is set up with a random orthonormal V and an SAE of the real size
(zeros or an identity would multiply faster than what training meets).

Memory of `step`, in 10^9 bytes: 5.30e9 parameters in bf16 with gradients and AdamW's moments 42.4; the 1.44e9 of
down_proj with fp32 masters 23.1, since a projected update rounds away in bf16 (`Constraint` in
`cwac/constraints/subspace.py`); V and A 2.0 at rank 1024, 10.6 at half of d_ffn; SAE 1.1. Every matrix with fp32
masters would take 104, V and A left aside, so `closed` has 16 of the 32 blocks: 51.8, frozen embeddings and head 1.0,
V and A 12.0 at half, SAE 1.1. SFT trains the same parameters in the same precision, `closed`'s SFT thus no embeddings
either.
"""

from __future__ import annotations

import gc
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from benchmarks import constraint as products
from benchmarks import runner
from benchmarks.runner import Skipped, clock, entry, paired, timed
from benchmarks.sae import plain
from cwac.constraints.sae.autoencoder import RoutedSAE
from cwac.constraints.sae.fit import SAEConfig, train_sae
from cwac.constraints.settings import Activation, Weight
from cwac.constraints.subspace import Basis, Constraint, fit_subspace, project_, tf32
from cwac.constraints.weight import constrained
from cwac.core import config
from cwac.core.config import Parser, command
from cwac.methods.base import Batch, Method, Sizes
from cwac.methods.cwac import CWAC
from cwac.models.hooks import layers_of, residuals
from cwac.models.layers import decoder_layers, input_group, linears
from cwac.training import arguments, engine

OUT = Path("benchmarks/large.json")
GIB = 2**30
CONF = OmegaConf.to_container(config.compose(["model=llama2"]).model)
PAPER_SUBSPACE = 18 * 60.0
"""Seconds for all layers (arXiv:2604.12384, App. D)."""
PAPER_SAE = 6.5
"""Hours for 100 M tokens (the same)."""


@dataclass(frozen=True)
class Shape:
    """Sizes of every part."""

    architecture: dict
    """Of the model, as `AutoConfig.for_model` takes it."""
    sae: dict
    """Fields of `SAEConfig`."""
    closed_layers: int
    """Blocks of the model whose every matrix has fp32 masters."""
    rows: int = 4
    tokens: int = 512
    labels: int = 128
    """Tokens of a row that carry a label, its last ones."""
    prompt_tokens: int = 32
    """Of each of the 4 harmful prompts of L_safety."""
    shares: tuple[float, ...] = (1024 / 11008, 0.5)
    """Rank of V over its input's dimension; energy 0.99 gives SmolLM2 0.52 (`Sizes.rank_share`)."""
    pairs: int = 4
    repeats: int = 5
    subspace_tokens: int = 8000
    sae_steps: int = 5


LLAMA2 = Shape(CONF["shape"], CONF["sae"], closed_layers=16)
TINY = Shape(
    {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    {"batch": 64, "tokens": 6400},
    closed_layers=2,
    rows=2,
    tokens=16,
    labels=8,
    prompt_tokens=8,
    shares=(0.1, 0.5),
    pairs=2,
    repeats=2,
    subspace_tokens=400,
    sae_steps=2,
)
SHAPES = {"llama2": LLAMA2, "tiny": TINY}


class Budget:
    """What is left of the seconds that the whole run may take."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


# --- steps -----------------------------------------------------------------------------------------------
@dataclass
class InTurns(Method):
    """Plain fine-tuning and a defence on one model and one optimizer: two models of 7B do not fit one card."""

    defence: CWAC
    plan: list[bool]
    """Of each step, whether the defence acts in it."""
    acts: bool = False

    def batch(self, batch: Batch, step: int, part: tuple[int, int]) -> Batch:
        self.acts = self.plan[step]
        return batch

    def penalty(self, model: nn.Module, step: int) -> Tensor | None:
        return self.defence.penalty(model, step) if self.acts else None

    def after_step(self, model: nn.Module) -> None:
        if self.acts:
            self.defence.after_step(model)


class Watch(TrainerCallback):
    """Seconds and peak bytes of each step, from the fetching of its batch to the zeroing of its gradients."""

    def __init__(self, prepare: Callable[[int], None]):
        self.prepare, self.now = prepare, clock()
        self.seconds: list[float] = []
        self.peaks: list[float] = []

    def restart(self, step: int) -> None:
        self.prepare(step)  # outside the measured time
        engine.reset_peak_memory()
        self.began = self.now()

    def on_train_begin(self, args, state, control, **kwargs):
        self.restart(0)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.began)
        self.peaks.append(engine.peak_memory() * 2**20)
        if state.global_step < state.max_steps:
            self.restart(state.global_step)


def step(shape: Shape, where: torch.device, budget: Budget) -> Iterator[dict]:
    """CWAC on down_proj, whose masters are fp32, in a model of bf16 weights."""
    model = llama(shape, where, torch.bfloat16)
    for module in linears(model, ["down_proj"]).values():
        module.float()
    yield from in_turns(shape, where, model, Weight(), "cwac (down_proj fp32, rest bf16)", 1.1, 1.05)


def closed(shape: Shape, where: torch.device, budget: Budget) -> Iterator[dict]:
    """CWAC on every matrix: fp32 masters of all of them, in as many blocks as fit."""
    model, n = llama(shape, where, torch.float32, shape.closed_layers), shape.architecture["num_hidden_layers"]
    trained = {id(module.weight) for module in linears(model, "all").values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    name = f"cwac_closed (fp32, {shape.closed_layers} of {n} blocks)"
    yield from in_turns(shape, where, model, Weight(modules="all", freeze_others=True), name, 1.2, None)


def in_turns(
    shape: Shape, where: torch.device, model: nn.Module, weight: Weight, name: str, time_bar: float, memory_bar
) -> Iterator[dict]:
    """Rows for each rank of V, and of the two halves of CWAC alone.

    Both kinds of step train the same parameters of one model, through the engine that runs train with. V, A and the
    SAE are there in SFT's steps too, and are taken off their peak.
    """
    defence = CWAC("cwac", None, Activation(sae=shape.sae))
    with torch.no_grad():
        held = defence.estimate_memory(model, Sizes(prompt_tokens=shape.prompt_tokens)).tensors["SAE"]
    defence.weight = weight
    length = 2 * (1 + shape.pairs)  # of a rank's steps; the first pair allocates and does not count
    plan = [(i % 4 in (1, 2)) for i in range(length)] * len(shape.shares)  # who begins takes turns
    extra, alone = {}, {}

    def prepare(at: int) -> None:
        if at % length:
            return
        share = shape.shares[at // length]
        with torch.no_grad():
            constrain_(defence, model, share)
            alone[share] = np.array([timed(lambda: defence.after_step(model))[0] for _ in range(4)])[1:]
        entries = defence._constraint.entries
        moved = {id(V): V for _, _, V, _ in entries}.values()
        extra[share] = sum(t.nbytes for t in (*held, *moved, *(A for *_, A in entries)))

    watch = Watch(prepare)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(shape, where, model, InTurns("in_turns", defence, plan), len(plan), folder)
        trainer.add_callback(watch)
        trainer.train()
    batch, rival = f"{shape.rows} x {shape.tokens} tokens", "step of sft"
    n_tokens, d = shape.rows * shape.tokens, model.config.intermediate_size
    for i, share in enumerate(shape.shares):
        chosen = range(i * length + 2, (i + 1) * length)
        ours, theirs = ([s for s in chosen if plan[s] is acts] for acts in (True, False))
        mine, sft = (np.array([watch.seconds[s] for s in steps]) for steps in (ours, theirs))
        peak = max(watch.peaks[s] for s in ours)
        plainly = max(watch.peaks[s] for s in theirs) - extra[share]
        rank = f"rank {share:.2g} d ({max(1, round(share * d))} of {d})"
        detail = {
            **speed(n_tokens, mine),
            **{f"rival_{key}": value for key, value in speed(n_tokens, sft).items()},
            "peak_gib": round(peak / GIB, 2),
            "rival_peak_gib": round(plainly / GIB, 2),
        }
        yield entry(f"step of {name}, {rank}, {batch}", rival, mine / sft, time_bar) | detail
        if where.type == "cuda":  # elsewhere the process's peak, from which nothing can be taken off
            yield entry(f"peak memory of {name}, {rank}", "peak memory of sft", peak / plainly, memory_bar) | detail
        spent = {"seconds": round(float(np.median(alone[share])), 5)}
        yield entry(f"projection alone, {name}, {rank}", rival, alone[share] / np.median(sft)) | spent
    target = defence._targets["anchors"]

    def safety() -> None:
        with torch.autocast(where.type, torch.bfloat16):
            loss = target.loss(model, range(len(target)))
        loss.backward()

    took = np.array([timed(safety)[0] for _ in range(1 + shape.repeats)])[1:]
    what = f"L_safety alone, with its backward pass, {len(target)} prompts of {shape.prompt_tokens} tokens"
    spent = {"seconds": round(float(np.median(took)), 5)}
    yield entry(f"{what}, {name}", rival, took / np.median(sft)) | spent


def build_trainer(
    shape: Shape, where: torch.device, model: nn.Module, method: Method, steps: int, folder: str
) -> engine.MethodTrainer:
    """The engine's trainer on random rows, with the settings of conf/train/large.yaml but for the 8-bit optimizer."""
    given = {
        "per_device_train_batch_size": shape.rows,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "save_strategy": "no",
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "adamw_torch_fused",  # its moments have the parameter's dtype
        "use_cpu": where.type == "cpu",
    }
    args = arguments.training_arguments(
        OmegaConf.create({"seed": 0, "train": given}), SimpleNamespace(dir=Path(folder))
    )
    ids = torch.randint(model.config.vocab_size, (steps * shape.rows, shape.tokens)).tolist()
    first = shape.tokens - shape.labels
    rows = [{"input_ids": x, "labels": [-100] * first + x[first:]} for x in ids]
    return engine.build_trainer(model, method, rows, args, 0)


def constrain_(defence: CWAC, model: nn.Module, share: float) -> None:
    """Give the defence a constraint whose V are random orthonormal of `share` of each input's dimension."""
    defence._constraint = None  # frees the one before
    modules, _ = constrained(model, defence.weight)
    dims = {input_group(name): module.in_features for name, module in modules.items()}
    drawn = {d: orthonormal(d, max(1, round(share * d)), model.device) for d in set(dims.values())}
    # copies: each layer has its own in a run, and reads it from memory
    bases = {name: Basis(drawn[d].clone(), 1.0, 1) for name, d in dims.items()}
    defence._constraint = Constraint(modules, bases)


def llama(shape: Shape, where: torch.device, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """A random model, made on its device."""
    changed = {} if layers is None else {"num_hidden_layers": layers}
    with where:
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**{**shape.architecture, **changed}), dtype=dtype
        ).train()


def orthonormal(d: int, k: int, where: torch.device) -> Tensor:
    """[d, k], fp32."""
    return torch.linalg.qr(torch.randn(d, k, device=where))[0].contiguous()


# --- the weight constraint by itself ---------------------------------------------------------------------
def constraint(shape: Shape, where: torch.device, budget: Budget) -> Iterator[dict]:
    """One matrix and all of them against the product with a dense Pi, and `project_` in other precisions."""
    d, d_out = shape.architecture["intermediate_size"], shape.architecture["hidden_size"]
    layers = shape.architecture["num_hidden_layers"]
    for share in shape.shares:
        with where:
            rows = list(products.projection(d, d_out, max(1, round(share * d)), shape.repeats))
        for row in rows:  # the bars are for rank 1024: at half, two thin products cost what one with Pi does
            yield row if share == shape.shares[0] else row | {"bar": None, "met": None}
        yield from precisions(d, d_out, max(1, round(share * d)), where, shape.repeats)
    yield every_matrix(d, d_out, max(1, round(shape.shares[0] * d)), layers, where, shape.repeats)


def every_matrix(d: int, d_out: int, k: int, layers: int, where: torch.device, repeats: int) -> dict:
    """`project_` of as many matrices as there are layers, each with its own V, against one Pi that serves all."""
    V = orthonormal(d, k, where)
    held = [(torch.randn(d_out, d, device=where), V.clone()) for _ in range(layers)]
    held = [(W, V, W @ V) for W, V in held]
    Pi = torch.eye(d, device=where).addmm_(V, V.T, alpha=-1)
    update, projected = torch.randn(d_out, d, device=where), torch.empty(d_out, d, device=where)

    def ours() -> None:
        for W, V, A in held:
            project_(W, V, A)

    def rival() -> None:
        for _ in held:
            torch.mm(update, Pi, out=projected)

    name = f"constraint of {layers} matrices, W {d_out} x {d}, rank {k}, fp32"
    return entry(name, f"{layers} dense products with Pi", paired(ours, rival, repeats), 1 / 5)


def precisions(d: int, d_out: int, k: int, where: torch.device, repeats: int) -> Iterator[dict]:
    """`project_` with tensor cores: time against fp32's, and how much of a planted drift W V - A it leaves.

    The drift is of a step of 2e-5 in each weight of size 0.02. TF32 exists on a GPU alone; elsewhere all are equal.
    """
    V = orthonormal(d, k, where)
    start = 0.02 * torch.randn(d_out, d, device=where)
    A = (start.double() @ V.double()).float()
    moved = start.add_(2e-5 * torch.randn(d_out, d, device=where))
    head, tail = split(V)

    def in_fp32(W: Tensor) -> None:
        W.addmm_(torch.addmm(A, W, V, beta=-1), V.T, alpha=-1)

    def as_trained(W: Tensor) -> None:
        project_(W, V, A)

    def all_in_tf32(W: Tensor) -> None:
        with tf32(where):
            in_fp32(W)

    def in_three_products(W: Tensor) -> None:
        # W V with both factors in two TF32 parts, whose smallest product is left out
        large, small = split(W)
        with tf32(where):
            drift = torch.addmm(A, large, head, beta=-1).addmm_(large, tail).addmm_(small, head)
            W.addmm_(drift, V.T, alpha=-1)

    def drift(W: Tensor) -> float:
        return float((W.double() @ V.double() - A).norm())

    def left(name: str, act: Callable[[Tensor], None]) -> dict:
        W = moved.clone()
        act(W)
        return entry(f"drift left, {name}, {size}", "1/1000 of the step's drift", 1000 * drift(W) / before)

    before, size, work = drift(moved), f"W {d_out} x {d}, rank {k}", moved.clone()
    ways = {
        "correction in TF32": as_trained,
        "W V in three TF32 products, correction in TF32": in_three_products,
        "all in TF32": all_in_tf32,
    }
    yield left("fp32", in_fp32)
    for name, act in ways.items():
        measured = paired(lambda act=act: act(work), lambda: in_fp32(work), repeats)
        yield entry(f"constraint of one matrix, {name}, {size}", "all in fp32", measured)
        yield left(name, act)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as a part that TF32 holds exactly and the rest."""
    head = (x.view(torch.int32) & -(1 << 13)).view(torch.float32)  # 13 of fp32's 23 bits of mantissa cleared
    return head, x - head


# --- subspace --------------------------------------------------------------------------------------------
def subspace(shape: Shape, where: torch.device, budget: Budget) -> Iterator[dict | Skipped]:
    """V of one layer by `fit_subspace`, and ways of decomposing its activations X [N, d] or C = X^T X [d, d]."""
    d, n = shape.architecture["intermediate_size"], shape.subspace_tokens
    layers = shape.architecture["num_hidden_layers"]

    def tokens(n: int, d: int) -> Tensor:
        falling = torch.arange(1, d + 1, device=where, dtype=torch.float64) ** -0.5
        return torch.randn(n, d, device=where, dtype=torch.float64) * falling

    def small_model(n: int, d: int) -> tuple[nn.Module, list[dict]]:
        return products.block(1, 64, d).to(where), products.random_rows(n, 100 if n >= 100 else n)

    def gram(x: Tensor) -> Tensor:
        """V [d, n] of x [n, d]: eigenvectors of x x^T, mapped back."""
        values, U = torch.linalg.eigh(x @ x.T)
        return (x.T @ U) / values.clamp_min(torch.finfo(x.dtype).tiny).sqrt()

    ways: dict[str, tuple[Callable, Callable]] = {
        "fit_subspace": (small_model, lambda made: fit_subspace(*made, ["down_proj"])),
        "eigh of X X^T in float64": (tokens, gram),
        "eigh of C in float64": (tokens, lambda x: torch.linalg.eigh(x.T @ x)),
        "eigh of X X^T in fp32": (tokens, lambda x: gram(x.float())),
        "full SVD of C in fp32": (tokens, lambda x: torch.linalg.svd(x.T.float() @ x.float())),
    }
    found = {}
    for name, (make, act) in ways.items():
        allowed = min(12.0, (budget.left() - 45) / 2)  # the rest is for what comes after
        seconds, how = at_full_size(make, act, n, d, allowed)
        found[name] = seconds
        spent = {"seconds": round(seconds, 3)}
        what = f"{layers} layers by {name}, d {d}, {n} tokens{how}"
        bar = 1.0 if name == "fit_subspace" else None
        yield entry(f"subspaces of {what}", "60 s", layers * seconds / 60, bar) | spent
        if name == "fit_subspace":
            yield entry(f"subspaces of {what}", "18 min (paper)", layers * seconds / PAPER_SUBSPACE) | spent
    yield entry(
        f"subspace of one layer, d {d}, {n} tokens, as the rows above took it",
        "full SVD of C in fp32",
        found["fit_subspace"] / found["full SVD of C in fp32"],
        1 / 10,
    )


def at_full_size(make: Callable, act: Callable, n: int, d: int, allowed: float) -> tuple[float, str]:
    """Seconds of act(make(n, d)), and how they were found.

    A decomposition cannot be interrupted, so it is taken at an eighth, a quarter and all of both sizes as long as the
    cube of the sizes foresees less than `allowed` seconds for the next; otherwise the last is extrapolated by it.
    """
    given = make(n // 8, d // 8)
    act(given)  # a library's first call loads it
    seconds, size = timed(lambda: act(given))[0], 8
    for part in (4, 1):
        if seconds * (size / part) ** 3 > allowed:
            return seconds * size**3, f" (extrapolated from {n // size} x {d // size})"
        given = make(n // part, d // part)
        seconds, size = timed(lambda given=given: act(given))[0], part
    return seconds, ""


# --- SAE -------------------------------------------------------------------------------------------------
def sae(shape: Shape, where: torch.device, budget: Budget) -> Iterator[dict]:
    """Training on activations that lie on the device, a plain PyTorch step between ours; then what drawing costs."""
    d, layers = shape.architecture["hidden_size"], shape.architecture["num_hidden_layers"]
    settings = SAEConfig(**shape.sae)
    m, k, n = settings.m or 8 * d, settings.latents(d), settings.batch
    readable = list(range(max(1, layers // 4) - 1, 3 * layers // 4))  # as layers_of has them
    activations = torch.randn(n, len(readable), d, device=where, dtype=torch.float16)

    def train(beside: Callable[[Tensor], object] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of each step but the first, ours and those of `beside`, which takes its turn at every draw."""
        began, ours, theirs, now = [], [], [], clock()

        def draw(_n: int) -> Tensor:
            if began:
                ours.append(now() - began[-1])
            if beside is not None:
                x = activations[:, 0].float()
                with where, torch.enable_grad():  # the draw that initialises comes without gradients
                    theirs.append(timed(lambda: beside(x))[0])
            began.append(now())
            return activations.float()

        model = RoutedSAE(d, m, k, readable, settings.router)
        train_sae(model, draw, SAEConfig(**{**shape.sae, "tokens": (shape.sae_steps + 1) * n}), where)
        ours.append(now() - began[-1])
        return np.array(ours[2:]), np.array(theirs[2:])  # after the draw that initialises and the first step

    def hours(seconds: float) -> float:
        return settings.tokens / n * seconds / 3600

    size = f"d {d}, M {m}, k {k}, batches of {n}"
    corpus = f"SAE training, {settings.tokens:.3g} tokens (extrapolated)"
    with where:
        step, _ = plain(d, m, k, activations[:, 0].float())
    ours, theirs = train(step)
    del step  # with its moments
    spent = speed(n, ours)
    name = f"step of SAE training, fp32, {len(readable)} slots, {size}"
    yield entry(name, "plain PyTorch, 1 slot", ours / theirs) | spent
    yield entry(f"{corpus}, fp32, {size}", "1 h", hours(spent["seconds"]), 1.0) | spent
    yield entry(f"{corpus}, fp32, {size}", f"{PAPER_SAE:g} h (paper)", hours(spent["seconds"]) / PAPER_SAE) | spent
    with tf32(where):
        spent = speed(n, train()[0])
    yield entry(f"{corpus}, TF32, {size}", "1 h", hours(spent["seconds"])) | spent
    part = max(1, n // 4)
    host = activations[:part].cpu()

    def from_host() -> Tensor:  # as TokenBuffer draws, and train_sae moves
        return torch.cat([host[torch.randperm(part)]]).float().to(where)

    from_host()
    spent = speed(part, np.array([timed(from_host)[0] for _ in range(2)]))
    name = f"{settings.tokens:.3g} tokens drawn from the host's memory, {len(readable)} slots (extrapolated)"
    yield entry(name, "1 h", hours(spent["seconds"] * n / part)) | spent


def speed(tokens: int, took: np.ndarray) -> dict:
    """Median seconds, and tokens a second."""
    seconds = float(np.median(took))
    return {"seconds": round(seconds, 5), "tokens_per_s": round(tokens / seconds)}


# --- L_safety --------------------------------------------------------------------------------------------
def safety(shape: Shape, where: torch.device, budget: Budget) -> Iterator[dict]:
    """L_safety's forward pass against the whole one, and the forward pass that reads the SAE's data."""
    model = llama(shape, where, torch.bfloat16)
    activation = Activation(sae=shape.sae)
    defence = CWAC("cwac", None, activation)
    with torch.no_grad():
        defence.estimate_memory(model, Sizes(prompt_tokens=shape.prompt_tokens))
    target, n, length = defence._targets["anchors"], activation.n_prompts, shape.prompt_tokens
    ids = torch.ones(n, length, dtype=torch.long, device=where)

    def whole() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)

    measured = paired(lambda: target.loss(model, range(n)), whole, 2 * shape.repeats, warm_up=2)
    layers, read = len(decoder_layers(model)), target.sae.layers[target.used[-1]] + 1
    name = f"L_safety of {n} harmful prompts of {length} tokens, read after block {read} of {layers}"
    yield entry(name, "forward pass of the same prompts", measured, (read + 1) / layers)
    readable, settings = layers_of(model, "auto"), SAEConfig(**shape.sae)
    ids = torch.randint(model.config.vocab_size, (2 * shape.rows, shape.tokens), device=where)

    def activations() -> Tensor:
        with torch.no_grad():
            return residuals(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, readable)

    took = np.array([timed(activations)[0] for _ in range(1 + shape.repeats)])[1:]
    hours = settings.tokens / ids.numel() * took / 3600
    name = f"residuals of {settings.tokens:.3g} tokens, {len(readable)} slots, bf16 (extrapolated)"
    yield entry(name, "1 h", hours) | speed(ids.numel(), took)


PARTS: dict[str, tuple[Callable[[Shape, torch.device, Budget], Iterator], float]] = {
    "step": (step, 30),
    "closed": (closed, 30),
    "constraint": (constraint, 15),
    "subspace": (subspace, 35),
    "sae": (sae, 30),
    "safety": (safety, 8),
}
"""In the order of their value, with the seconds that must be left to begin one."""


def run(shape: Shape, where: torch.device, parts: list[str], out: Path, seconds: float) -> int:
    """Measure the parts, write each row at once, print the table; the exit status of `runner.report`."""
    budget, rows, skipped = Budget(seconds), [], []
    card = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    machine = {"card": card, "torch": torch.__version__}
    for name in parts:
        part, needed = PARTS[name]
        if budget.left() < needed:
            skipped.append(Skipped(name, f"{budget.left():.0f} s left, {needed} wanted", barred=True))
            continue
        engine.reset_peak_memory()
        began = time.monotonic()
        try:
            for item in part(shape, where, budget):
                row = item | machine
                row.setdefault("peak_gib", round(engine.peak_memory() * 2**20 / GIB, 2))
                rows.append(row)
                runner.save([row], out)
                print(f"{row['name']} / {row['rival']}: {row['ratio']:.3f}", file=sys.stderr, flush=True)
        except Exception as error:  # whatever it is, the machine is lent for the other parts too
            reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
            skipped.append(Skipped(name, reason, barred=True))
            print(f"{name} failed: {reason}", file=sys.stderr, flush=True)
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return runner.report(rows, skipped)


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a bar is missed or a part was not measured, 2 for bad input or no GPU."""
    parser = Parser(prog="python -m benchmarks.large", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama2", help="(%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU; with --shape tiny alone")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, in this order (%(default)s)")
    parser.add_argument("--seconds", type=float, default=150.0, help="of the whole run (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="(%(default)s)")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no part is called {unknown[0]}; use some of {', '.join(PARTS)}")
    if args.cpu and args.shape != "tiny":
        parser.error("--cpu goes with --shape tiny alone")
    if not args.cpu and not torch.cuda.is_available():
        print("error: no CUDA device here; --shape tiny --cpu runs the miniature", file=sys.stderr)
        return 2
    shape = SHAPES[args.shape]
    if args.cpu:
        return runner.quietly(lambda: run(shape, torch.device("cpu"), parts, args.out, args.seconds))
    logging.disable(logging.WARNING)
    torch.set_float32_matmul_precision("highest")  # torch's default, which the environment may override
    return run(shape, torch.device("cuda", torch.cuda.current_device()), parts, args.out, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
