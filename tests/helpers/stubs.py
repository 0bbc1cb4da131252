"""Stand-ins of packages that are not installed here."""

from pathlib import Path

STUBS = Path(__file__).parent.parent / "stubs"
