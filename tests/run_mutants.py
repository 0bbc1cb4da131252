"""Tries mutmut's mutants, or a seeded sample of those of each module, and lists the ones that no test noticed.

`make mutants SAMPLE=40 ARGS="cwac.methods.lisa cwac.methods.bea" TESTS=test_baselines_data`: the same size and seed
draw the same mutants as long as the module is the same. Without a size every mutant whose name matches is tried, and
all of them if no name is given.

Started by its path: as `tests.run_mutants` it would hold the package `tests` of which mutmut runs a copy.
"""

import argparse
import random
from collections import Counter

import libcst as cst
from mutmut import __main__ as mutmut
from mutmut.mutation.file_mutation import MutationVisitor

PLAIN = {"no_grad", "inference_mode"}
"""Decorators of torch that leave a function what it is."""


def mutate_without_gradients() -> None:
    """Have mutmut change functions under `@torch.no_grad()` too: it passes over every function with a decorator."""
    skip = MutationVisitor._skip_node_and_children

    def skip_unless_plain(visitor: MutationVisitor, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef):
            calls = [d.decorator.func for d in node.decorators if isinstance(d.decorator, cst.Call)]
            names = [f.attr.value for f in calls if isinstance(f, cst.Attribute)]
            if len(names) == len(node.decorators) and set(names) <= PLAIN:
                node = node.with_changes(decorators=[])
        return skip(visitor, node)

    MutationVisitor._skip_node_and_children = skip_unless_plain


def verdicts() -> dict[str, str]:
    """Mutant -> `killed`, `survived`, `timeout`, `no tests` or `not checked`, of all modules under `only_mutate`."""
    found, _ = mutmut.collect_source_file_mutation_data(mutant_names=[])
    return {name: mutmut.status_by_exit_code[code] for _, name, code in found}


def write_mutants() -> list[str]:
    """Fill mutants/, as `mutmut run` does before it tries anything; returns the mutants' names."""
    mutmut.makedirs(mutmut.Path("mutants"), exist_ok=True)
    mutmut.set_mutant_under_test("mutant_generation")
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.setup_source_paths()
    mutmut.store_lines_covered_by_tests()
    mutmut.create_mutants(1)
    return sorted(verdicts())


def of(module: str, names: list[str]) -> list[str]:
    """The mutants of one module, named `module.x_function__mutmut_1` or `module.xǁClassǁmethod__mutmut_1`."""
    return [name for name in names if name.rpartition(".")[0] == module]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="patterns of mutants; modules where --size is given")
    parser.add_argument("--size", type=int, help="mutants of each module, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mutate_without_gradients()
    if args.size is None:
        mutmut._run(tuple(args.names), 1)
        tried = {"all": [name for name, verdict in verdicts().items() if verdict != "not checked"]}
    else:
        names = write_mutants()
        for module in args.names:
            if not of(module, names):
                parser.error(f"{module} has no mutants: give a module under only_mutate in pyproject.toml")
        tried = {}
        for module in args.names:
            own = of(module, names)
            tried[module] = random.Random(f"{args.seed}-{module}").sample(own, min(args.size, len(own)))
        mutmut._run([name for sample in tried.values() for name in sample], 1)
    verdict = verdicts()
    for title, sample in tried.items():
        total = len(verdict) if args.size is None else len(of(title, list(verdict)))
        counts = Counter(verdict[name] for name in sample)
        print(f"{title}: {len(sample)} of {total} tried,", ", ".join(f"{n} {v}" for v, n in sorted(counts.items())))
        for name in sorted(sample):
            if verdict[name] != "killed":
                print(f"    {verdict[name]}: {name}")


if __name__ == "__main__":
    main()
