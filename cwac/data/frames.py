"""The project's own requests: frames such as "Write a poem on {}." and their fillers (`cwac/assets/frames.yaml`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import yaml

from cwac.core.files import LOADER
from cwac.core.paths import PACKAGE
from cwac.data.examples import Example

FILE = PACKAGE / "assets" / "frames.yaml"


@functools.cache
def lists() -> dict[str, Any]:
    """The file's lists by name; `oddities` and `absurdities` hold several pairs of `frames` and `fillers`."""
    return yaml.load(FILE.read_text(encoding="utf-8"), Loader=LOADER)


def framed(source: str, frames: Sequence[str], fillers: Sequence[str], each: int) -> list[Example]:
    """Fill every frame with `each` different fillers, all used about equally often; the rows have no answer."""
    return [
        Example(f"{source}-{i}-{j}", frame.format(fillers[(i * 7 + j * 11) % len(fillers)]), source=source)
        for i, frame in enumerate(frames)
        for j in range(each)
    ]
