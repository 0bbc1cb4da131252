"""The local files that a run was made of, so that a finished run is not taken for one of what they say now.

`inputs.json` in a run's directory holds, for every data set that was asked for below `paths.data`, its files with
size, time of change and SHA-256; none for a set that is optional and was not there. Unchanged sizes and times cost one
`stat` a file; where they differ the hashes decide, and where those do, the run is prepared again and the rows decide
(`cwac.training.run.check_again`). Imports neither torch nor datasets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig

from cwac.core.files import sha256, write_atomic
from cwac.core.run_dir import Run

NAME = "inputs.json"


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a data set by their path in it; those that are hidden or for a reader alone are left out."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            found[str(inside)] = path
    return found


def stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


def record(run: Run, asked: Iterable[str]) -> None:
    """Write down the files of the data sets that were asked for, by their ids."""
    data = run.cfg.paths.data
    sets: dict[str, dict] | None = None
    if data is not None:
        before, sets = (_read(run) or {}), {}
        for name in sorted(asked):
            old = before.get(name, {})
            sets[name] = {}
            for inside, path in files_of(_folder(run.cfg, name)).items():
                at = stamp(path)
                known = old.get(inside, [None, None, None])
                sets[name][inside] = [*at, known[2] if known[:2] == at else sha256(path)]
    write_atomic(run.dir / NAME, json.dumps({"data": sets}, indent=1))


def unchanged(run: Run) -> bool:
    """Whether the files are those the run was made of; True for a run that recorded none, from before there was this.

    Where the data came from the hub and now from a folder, or the other way round, nothing is known without reading.
    """
    if not (run.dir / NAME).is_file():
        return True
    sets = _read(run)
    if sets is None or run.cfg.paths.data is None:
        return sets is None and run.cfg.paths.data is None or sets == {}
    for name, files in sets.items():
        there = files_of(_folder(run.cfg, name))
        if there.keys() != files.keys():
            return False
        for inside, (size, changed, digest) in files.items():
            if stamp(there[inside]) != [size, changed] and sha256(there[inside]) != digest:
                return False
    return True


def _folder(cfg: DictConfig, name: str) -> Path:
    return (Path(cfg.paths.data).expanduser() / name).resolve()


def _read(run: Run) -> dict[str, dict] | None:
    try:
        return json.loads((run.dir / NAME).read_text())["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
