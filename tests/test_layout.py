"""The packages form a stack in which imports only go down, and what names a frozen run does not move with a file."""

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest

from cwac.core.config import compose, grid
from cwac.core.identity import TINY_ORIGIN, eval_id, run_id
from cwac.core.paths import PACKAGE
from cwac.data import tiny_world
from cwac.models.tiny import WEIGHTS
from tests.conftest import ROOT
from tests.helpers.options import PRESETS

STACK = ("core", "data", "models", "constraints", "methods", "evaluation", "training")
"""Lowest first; a package imports only itself and those before it."""
ABOVE = ("experiments", "analysis", "benchmarks", "tests", "train")
"""What no package of cwac may import."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Modules of the project that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name, so that a reader sees from where"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = inside & MODULES.keys()
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(node.module)
    return {name for name in found if name.split(".")[0] in ("cwac", *ABOVE)}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every group of nodes that can reach each other (Tarjan's strongly connected components of two and more)."""
    index, low, stack, groups = {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1 or node in graph.get(node, ()):
                groups.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return groups


def floor(module: str) -> int:
    """0 is the lowest package; `cwac` itself, which hands out the public names, stands above all."""
    parts = module.split(".")
    return STACK.index(parts[1]) if len(parts) > 1 else len(STACK)


def test_imports_only_go_down():
    upward = [
        f"{module} -> {other}"
        for module, path in MODULES.items()
        for other in imported(path)
        if other.split(".")[0] in ABOVE or floor(other) > floor(module)
    ]
    assert upward == []


def test_no_module_and_no_package_stands_in_a_circle():
    modules = {module: imported(path) & MODULES.keys() for module, path in MODULES.items()}
    packages = defaultdict(set)
    for module, others in modules.items():
        own = module.split(".")[:2]
        packages[".".join(own)] |= {".".join(other.split(".")[:2]) for other in others} - {".".join(own)}
    assert circles(modules) == [] and circles(packages) == []


def test_the_circle_finder_finds_circles():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_every_module_says_what_it_owns():
    silent = [name for name, path in MODULES.items() if len(ast.get_docstring(ast.parse(path.read_text())) or "") < 20]
    assert silent == []
    assert {name.split(".")[1] for name in MODULES if name != "cwac"} == set(STACK)


def test_core_loads_without_torch():
    names = [name for name in MODULES if name.startswith("cwac.core")]
    script = (
        f"import sys, {', '.join(names)}; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def world_digest() -> str:
    """A hash of the sentences that every generator of the embedded world gives."""
    pools = tiny_world.pools(0)
    tasks = [tiny_world.task(name, part, 200, 0) for name in tiny_world.TASKS for part in ("train", "test")]
    texts = [[(e.prompt, e.response, e.label) for e in rows] for rows in tasks]
    for name in ("poison", "anchors", "step", "sae", "benign", "safety", "validation"):
        texts.append([(e.prompt, e.response, e.label) for e in getattr(pools, name)])
    for sets in (pools.test, pools.over_refusal):
        texts += [[(e.prompt, e.response, e.label) for e in rows] for rows in sets.values()]
    return hashlib.sha256(json.dumps([texts, tiny_world.vocabulary()]).encode()).hexdigest()


SHIPPED = {
    "world": "d6e71bfd4109d0e610131d74dd779ae2abe22e40db0dd21fb7f6e23df12ff2ff",
    "seed0-aligned": "2f9ada8cb3bee9b6502f1304d70f1380700dff3b0515039004719e3115e5d9a7",
    "seed1-aligned": "d6567f0a9d53bd916f7f3c2bc8e83b71f1411d212d13c5696987f471c172a3cb",
    "seed2-aligned": "66620c1ed33e4ec8fbe2e6484d56afa399ab136e32ab6488564859c3ba25dbdf",
}
"""What `TINY_ORIGIN` stands for; where one of them changes on purpose, its entries have to change with it."""


@pytest.mark.parametrize("seed", range(3))
def test_the_embedded_models_version_stands_for_these_sentences_and_weights(seed):
    weights = (WEIGHTS / f"seed{seed}-aligned.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == SHIPPED[f"seed{seed}-aligned"]
    assert world_digest() == SHIPPED["world"]
    assert len(set(TINY_ORIGIN)) == 3


RECORDED: dict[str, list[str]] = json.loads((Path(__file__).parent / "run_ids.json").read_text())
"""Preset -> `<run id> <eval id>` of each of its cells in order, recorded at commit fb0e46d, before files moved;
the eval ids of real models when the semantic judge became theirs, those of later methods when they joined."""


def ids(cells: list[list[str]]) -> list[str]:
    composed = [compose(cell) for cell in cells]
    return [f"{run_id(cfg)} {eval_id(cfg)}" for cfg in composed]


def test_every_preset_is_recorded():
    assert set(PRESETS) >= RECORDED.keys()


@pytest.mark.parametrize("preset", sorted(RECORDED))
def test_a_presets_cells_keep_their_ids(preset):
    """Frozen results are found by these ids: a key that is renamed, moved or added may not change them."""
    cells, recorded = grid(preset), RECORDED[preset]
    assert len(cells) == len(recorded)
    sample = sorted({0, len(cells) // 2, len(cells) - 1})
    assert ids([cells[i] for i in sample]) == [recorded[i] for i in sample]


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(RECORDED))
def test_all_of_a_presets_cells_keep_their_ids(preset):
    assert ids(grid(preset)) == RECORDED[preset]


def test_the_frozen_demo_is_of_the_recorded_runs():
    """All of them, but `booster` and `repnoise` lack ratios and seeds, which the table names."""
    columns = ["run_id", "method"]
    frozen = pd.read_csv(ROOT / "results" / "demo" / "results.csv", usecols=columns).drop_duplicates()
    recorded = {line.split()[0] for line in RECORDED["demo_full"]}
    frozen = frozen[frozen["method"] != "aligned"]
    assert len(set(frozen["method"])) == 27 and set(frozen["run_id"]) <= recorded
    lacking = re.compile("-(booster|repnoise)-s")
    assert {name for name in recorded if not lacking.search(name)} <= set(frozen["run_id"])
