"""Data sets from the Hugging Face hub, or from a folder laid out like it (`paths.data`)."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from cwac.core.cache import digest
from cwac.core.errors import UserError
from cwac.core.files import write_atomic
from cwac.core.hf_hub import PROBE_SECONDS, first_line
from cwac.data.columns import Row

log = logging.getLogger(__name__)
LICENSES = {
    "walledai/AdvBench": "MIT",
    "walledai/HarmBench": "MIT",
    "walledai/XSTest": "CC BY 4.0",
    "tatsu-lab/alpaca": "CC BY-NC 4.0",
    "safety-tuned-llamas": "CC BY-NC 4.0",
    "JailbreakBench/JBB-Behaviors": "MIT",
    "PKU-Alignment/BeaverTails": "CC BY-NC 4.0",
    "stanfordnlp/sst2": "research use",
    "fancyzhx/ag_news": "research use",
    "openai/gsm8k": "MIT",
    "qiaojin/PubMedQA": "MIT",
}
"""Data set -> licence that its authors give; a run records the licences of the data sets it read."""
READ: dict[str, dict] = {}
"""What was read since the run began: `<id> (<config>, <split>)` -> licence, commit, number of rows, hash."""
ASKED: set[str] = set()
"""Ids of the data sets that were looked for since the run began, whether they exist or not."""
GATED = (
    "{0} is gated: accept its terms at https://huggingface.co/datasets/{0}, then log in with `hf auth login` or set "
    "HF_TOKEN; or set paths.data to a folder that has it"
)


def load_rows(
    hub_id: str,
    config: str | None,
    split: str,
    data: str | None = None,
    columns: Sequence[str] = (),
    revision: str | None = None,
) -> list[Row]:
    """The rows of one split; each remembers its place, which errors name.

    data: a folder with one sub-folder per hub id (`<data>/walledai/AdvBench/...`), read instead of the hub.
    columns: the columns that the caller needs. If one is missing, the error lists those that exist.
    revision: the commit to read from the hub; None is the newest. A folder is read as it is.

    Raises: UserError, one line, for a missing folder, data set, split or column, or an unreachable hub.
    """
    import datasets  # here and not above: it takes a second, and toy runs import this module too

    source = str(_folder(hub_id, data)) if data is not None else hub_id
    where = f"paths.data={data}" if data is not None else "the hub"
    newest = _probe(hub_id) if data is None else None
    revision = (revision or newest) if data is None else None
    bars = datasets.utils.logging.is_progress_bar_enabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # errors are reported once, below
    try:
        if data is None:
            rows = datasets.load_dataset(source, config, split=split, revision=revision)
            names, table = rows.column_names, rows.to_list()
        else:
            # Read as it is: the cache knows a folder by its name and README alone, and would serve one folder's rows
            # for another's, or last week's for today's.
            with tempfile.TemporaryDirectory() as nothing_cached:
                table = _read_folder(source, config, split, nothing_cached)
            names = list(dict.fromkeys(name for row in table for name in row))
    except Exception as error:  # whatever the many back ends raise, the user needs the same facts
        if data is None and "gated" in str(error):  # the probe cannot tell: a gated set describes itself to everybody
            raise UserError(GATED.format(hub_id)) from error
        raise UserError(
            f"{hub_id} ({config or 'default'}, {split}) could not be read from {where}: {first_line(error)}; "
            + ("compare the folder with its README" if data is not None else "or set paths.data to a local copy")
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
    if not table:
        raise UserError(
            f"{hub_id} ({config or 'default'}, {split}) from {where} has no rows; compare it with its README"
        )
    missing = [c for c in columns if c not in names]
    if missing:
        raise UserError(
            f"{hub_id} ({split}) from {where} has no column {', '.join(missing)}; it has {', '.join(names)}"
        )
    READ[f"{hub_id} ({config or 'default'}, {split})"] = {
        "license": LICENSES.get(hub_id, "unknown"),
        "revision": revision,
        "rows": len(table),
        "sha256": digest({"rows": table}),
    }
    return table if data is not None else [_placed(r, f"{hub_id} ({split})", i) for i, r in enumerate(table, 1)]


def _placed(row: Mapping, file: str, number: int) -> Row:
    placed = Row(row)
    placed.where = f"row {number} of {file}"
    return placed


def _read_folder(source: str, config: str | None, split: str, cache: str) -> list[Row]:
    """The split's rows; JSON and CSV without declared types are read as they are written.

    `datasets` guesses types by the values it meets first: a column of dates becomes timestamps, "007" a number, and
    the review "null" nothing at all.
    """
    import datasets

    builder = datasets.load_dataset_builder(source, config, cache_dir=cache)
    settings, paths = builder.config, [str(p) for p in (builder.config.data_files or {}).get(split, [])]
    kind = type(settings).__name__
    plain = all(Path(p).is_file() and not p.endswith((".zip", ".tar", ".tgz", ".tar.gz")) for p in paths)
    if not paths or not plain or settings.features is not None or kind not in ("JsonConfig", "CsvConfig"):
        rows = builder.as_streaming_dataset(split=split)
        file = paths[0] if len(paths) == 1 else f"{source} ({split})"
        return [_placed(row, file, i) for i, row in enumerate(rows, 1)]
    read = _json_rows if kind == "JsonConfig" else _csv_rows
    return [_placed(row, path, i) for path in paths for i, row in enumerate(read(path, settings), 1)]


def _json_rows(path: str, settings) -> Iterator[dict]:
    """The objects of a JSON list, of a field of a JSON object, or of JSON lines."""
    import fsspec

    with fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig") as file:
        content = file.read()
    if settings.field is not None or content.lstrip().startswith("["):
        found = json.loads(content) if settings.field is None else json.loads(content)[settings.field]
        if isinstance(found, dict):  # columns
            found = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        numbered = list(enumerate(found, 1))
    else:
        numbered = []
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"line {number} of {path} is no JSON ({error})") from error
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {path} is no JSON object")
        yield row


def _csv_rows(path: str, settings) -> Iterator[dict]:
    """The rows with every cell as text; a cell that is missing at the end of a short row is None."""
    import pandas as pd

    as_text = {"dtype": str, "keep_default_na": False, "na_values": None, "chunksize": None}
    frame = pd.read_csv(path, **{**settings.pd_read_csv_kwargs, **as_text})
    frame.columns = [str(name).strip() for name in frame.columns]
    if len(frame.columns) == 1 and (other := next((mark for mark in ";\t|" if mark in frame.columns[0]), None)):
        raise ValueError(
            f"{path} separates its columns by {other!r}; use commas, or say `sep: {other!r}` in its README"
        )
    for values in frame.itertuples(index=False, name=None):
        yield {
            name: value if isinstance(value, str) else None for name, value in zip(frame.columns, values, strict=True)
        }


def fetch(hub_id: str, name: str, data: str | None = None) -> Path:
    """One file of a data set's repository; for data sets with a loading script, which `datasets` no longer runs.

    data: as for `load_rows`. Raises UserError, one line, where the file cannot be had.
    """
    if data is not None:
        path = _folder(hub_id, data) / name
        if not path.is_file():
            raise UserError(f"{path.parent} has no {name}; put it there, or unset the folder to use the hub")
        return path
    import huggingface_hub

    _probe(hub_id)
    try:
        return Path(huggingface_hub.hf_hub_download(hub_id, name, repo_type="dataset"))
    except Exception as error:
        raise UserError(
            f"{hub_id}/{name} could not be read from the hub: {first_line(error)}; or give a folder that has it"
        ) from error


def ledger(artifacts: Path) -> dict[str, dict]:
    """What was read since the run began; warns if a data set has changed since an earlier run with this cache."""
    path = artifacts / "datasets.json"
    if READ:
        artifacts.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            try:
                before = dict(json.loads(path.read_text()))
            except (OSError, ValueError, TypeError):
                before = {}
            for name, entry in READ.items():
                old = before.get(name, entry)
                if changed := [k for k in ("rows", "sha256", "revision") if old.get(k) != entry[k]]:
                    said = ", ".join(f"{k} {old.get(k)} -> {entry[k]}" for k in changed)
                    log.warning("%s has changed since an earlier run: %s; the two do not compare", name, said)
            write_atomic(path, json.dumps({**before, **READ}, indent=1))
    return dict(READ)


def has_dataset(hub_id: str, data: str | None) -> bool:
    """Whether the folder `data` holds this data set; False where there is no folder."""
    ASKED.add(hub_id)
    return data is not None and (Path(data).expanduser() / hub_id).is_dir()


def _folder(hub_id: str, data: str) -> Path:
    ASKED.add(hub_id)
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(
            f"paths.data={data} is not a folder; give one laid out like the hub "
            f"(<folder>/{hub_id}/...), or leave it unset to use the hub"
        )
    folder = root / hub_id
    if not folder.is_dir():
        raise UserError(f"paths.data={data} has no {hub_id}; put it there, or unset paths.data to use the hub")
    return folder.resolve()


def _probe(hub_id: str) -> str | None:
    """The newest commit on the hub; None if the cache is used. One short request, so that offline use fails fast."""
    import datasets
    import huggingface_hub
    from huggingface_hub import errors

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None  # the user asked for the cache
    try:
        return huggingface_hub.HfApi().dataset_info(hub_id, timeout=PROBE_SECONDS).sha
    except errors.GatedRepoError as error:
        raise UserError(GATED.format(hub_id)) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{hub_id} is not on the hub, or is private; check the id, or set paths.data to a folder that has it"
        ) from error
    except Exception as error:
        if not _cached(hub_id):
            raise UserError(
                f"{hub_id}: the hub ({huggingface_hub.constants.ENDPOINT}) could not be reached "
                f"({first_line(error)}); set paths.data=<folder laid out like the hub>, or connect"
            ) from error
        datasets.config.HF_HUB_OFFLINE = True  # what is cached is read without further questions
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return None


def _cached(hub_id: str) -> bool:
    """Whether `datasets` has prepared this data set before."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / hub_id.replace("/", "___")).is_dir()
