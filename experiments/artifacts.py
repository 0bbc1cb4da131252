"""Push prepared artifacts (SAE, ranked latents, targets, subspaces) to a hub repository, or pull them from one.

python -m experiments.artifacts push --repo me/cwac-qwen
python -m experiments.artifacts pull --repo me/cwac-qwen --revision <commit>
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cwac.core.cache_hub import KINDS, pull, push
from cwac.core.config import about, command
from cwac.core.errors import UserError


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 1 where the hub or an artifact does not serve."""
    parser = argparse.ArgumentParser(prog="python -m experiments.artifacts", **about(__doc__))
    parser.add_argument("action", choices=("push", "pull"))
    parser.add_argument("--repo", required=True, help="hub id of a model repository, e.g. me/cwac-qwen")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="folder of the artifact cache")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--public", action="store_true", help="push: make a new repository public")
    parser.add_argument("--revision", help="pull: a commit, tag or branch")
    args = parser.parse_args(argv)
    try:
        if args.action == "push":
            moved = push(args.repo, args.artifacts, args.kind, private=not args.public)
        else:
            moved = pull(args.repo, args.artifacts, args.kind, args.revision)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(moved)} artifacts", *moved, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
