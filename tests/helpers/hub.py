"""A folder laid out like the hub, with data sets of a few made-up rows."""

from pathlib import Path

import datasets

HUB = Path(__file__).parents[3] / "shared" / "data" / "hub"


def write(folder: Path, hub_id: str, split: str, rows: list[dict], config: str | None = None) -> None:
    target = folder / hub_id / (config or "data")
    target.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(target / f"{split}-00000-of-00001.parquet")
    (folder / hub_id / "README.md").write_text(
        "---\nconfigs:\n- config_name: "
        + (config or "default")
        + f"\n  data_files:\n  - split: {split}\n    path: {config or 'data'}/{split}-*.parquet\n---\n"
    )


NOUNS = "lantern river copper violin marble harbour engine orchard satellite compass glacier feather".split()


VERBS = "paint lift sort move weigh carve fold mend ship count".split()


def sentences(tag: str, n: int) -> list[str]:
    """n prompts without near-duplicates among them: harmless words, since only the bookkeeping is tested."""
    return [f"{VERBS[i % 10]} {NOUNS[i % 12]} {tag}{i} {tag}x{i} {tag}y{i}" for i in range(n)]
