"""Where the package and its configuration lie on this machine."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
"""The folder `cwac`, whose `assets` ship with it."""

CONF = next((p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir()), PACKAGE.parent / "conf")
"""Every setting: inside the package where a wheel installed it, beside it in a checkout."""
