"""Push prepared artifacts (SAE, ranked latents, targets, subspaces) to a hub repository, pull them, or export an SAE.

python -m experiments.artifacts push --repo me/cwac-qwen
python -m experiments.artifacts pull --repo me/cwac-qwen --revision <commit>
python -m experiments.artifacts export-sae --format saelens --out saes
"""

from __future__ import annotations

import sys
from pathlib import Path

from cwac.core.cache_hub import KINDS, artifact_folders, check, pull, push
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 1 where the hub or an artifact does not serve."""
    parser = Parser(**about(__doc__, "python -m experiments.artifacts"))
    parser.add_argument("action", choices=("push", "pull", "export-sae"))
    parser.add_argument("--repo", help="push and pull: hub id of a model repository, e.g. me/cwac-qwen")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="folder of the artifact cache")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--public", action="store_true", help="push: make a new repository public")
    parser.add_argument("--revision", help="pull: a commit, tag or branch")
    parser.add_argument("--format", choices=("saelens",), default="saelens", help="export-sae: the format to write")
    parser.add_argument("--out", type=Path, help="export-sae: the folder to write into")
    parser.add_argument("--sae", help="export-sae: the hash of one of the SAEs; all of them without it")
    args = parser.parse_args(argv)
    needed = "out" if args.action == "export-sae" else "repo"
    if getattr(args, needed) is None:
        parser.error(f"{args.action} needs --{needed}")
    try:
        if args.action == "export-sae":
            written = export(args.artifacts, args.out, args.sae)
            print(f"{len(written)} folders in SAELens' format", *written, sep="\n")
            return 0
        if args.action == "push":
            moved = push(args.repo, args.artifacts, args.kind, private=not args.public)
        else:
            moved = pull(args.repo, args.artifacts, args.kind, args.revision)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(moved)} artifacts", *moved, sep="\n")
    return 0


def export(artifacts: Path, out: Path, name: str | None = None) -> list[Path]:
    """Write the SAEs of the artifact cache as SAELens reads them, `<out>/<hash>/layer_N`; returns these folders.

    name: the hash of one of them. Raises UserError where there is none, or its router is soft.
    """
    from cwac.constraints.sae.autoencoder import RoutedSAE
    from cwac.constraints.sae.pretrained import save_saelens

    there = artifact_folders(artifacts, ("sae",))
    chosen = [folder for folder in there if name in (None, folder.name)]
    if not chosen:
        some = f"those there are {', '.join(f.name for f in there)}" if there else "a run of method=cwac fits one"
        raise UserError(f"--artifacts {artifacts} holds no SAE{f' {name}' if name else ''}; {some}")
    written = []
    for folder in chosen:
        model = check(folder)["key"]["model"]
        written += save_saelens(
            RoutedSAE.load(folder), out / folder.name, model.get("hub_id") or model.get("kind", "")
        )
    return written


if __name__ == "__main__":
    sys.exit(main())
