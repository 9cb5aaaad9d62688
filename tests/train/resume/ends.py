"""Runs on the workers: runs and what they log."""

from __future__ import annotations

import logging
from pathlib import Path

from tests.train.health import ills


def run_and_hear(root: Path, run_dir: Path, *overrides: str) -> tuple[int | str, str]:
    """Trains. Returns the exit code or the error's message, and everything that was logged."""
    heard: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("nvlm_train")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        return ills.attempt(root, run_dir, *overrides), "\n".join(heard)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
