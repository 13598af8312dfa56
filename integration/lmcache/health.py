"""Our health check among those of LMCache's monitor."""

from __future__ import annotations

from pathlib import Path


def offer_health_check() -> None:
    """LMCache's monitor takes every check that it finds in the folders of one package: give it ours, too."""
    from lmcache.v1.health_monitor import checks

    folder = str(Path(__file__).parent / "health_checks")
    if folder not in checks.__path__:
        checks.__path__.append(folder)
