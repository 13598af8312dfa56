"""`vcache`: what people and scripts do with a pool from a shell."""

from __future__ import annotations

from vcache.cli.command import main

__all__ = ["main"]
