"""Manages the directory of a run's checkpoints: what it holds, in which order, what is removed.

No tensors are handled here. The directory has these entries:

STAGE-STEP            is a checkpoint; it is complete when its manifest.json is there and correct
writing-STAGE-STEP-x  is being written, or left over from a save that never ended
removing-STAGE-STEP   is being removed
damaged-STAGE-STEP    was found damaged when a run was resumed; it is kept for you to look at
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvlm_train.config.schema import CheckpointConfig
from nvlm_train.errors import CheckpointError
from nvlm_train.train.checkpoint import manifest
from nvlm_train.train.checkpoint.run_state import read_state

logger = logging.getLogger(__name__)

_WRITING, _REMOVING, _DAMAGED = "writing-", "removing-", "damaged-"


def checkpoint_dir(run_dir: Path) -> Path:
    """Returns the directory of a run's checkpoints."""
    return run_dir / "checkpoints"


def named_checkpoints(run_dir: Path) -> list[Path]:
    """Returns every checkpoint in the order of saving; those whose manifest cannot be read come last."""
    return [path for _, path in _by_sequence(run_dir)]


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Returns the checkpoints whose manifest is there and correct, oldest first."""
    return [path for _, path in _complete(run_dir)]


def _complete(run_dir: Path) -> list[tuple[float, Path]]:
    return [found for found in _by_sequence(run_dir) if found[0] < math.inf]


def _by_sequence(run_dir: Path) -> list[tuple[float, Path]]:
    """Returns (place in the order of saving, checkpoint); the place is infinite for a wrong manifest."""
    found = [
        (_sequence(path), path)
        for path in checkpoint_dir(run_dir).glob("*")
        if path.is_dir() and not path.name.startswith((_WRITING, _REMOVING, _DAMAGED))
    ]
    return sorted(found)


def _sequence(checkpoint: Path) -> float:
    try:
        return manifest.read_manifest(checkpoint).sequence
    except CheckpointError:
        return math.inf


def open_directory(run_dir: Path) -> None:
    """Makes the directory, removes what killed processes left, and tests that it can be written to.

    Raises:
        CheckpointError: it cannot be written to; this is found now and not at the first save.
    """
    directory = checkpoint_dir(run_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for pattern in (_WRITING, _REMOVING):
            for left_over in directory.glob(f"{pattern}*"):
                logger.warning("removing %s: left over from a process that was killed", left_over)
                remove(left_over)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckpointError(
            f"run_dir={run_dir}: no checkpoint can be written there: {error}; "
            "make it writable, or use another run_dir"
        ) from error


def begin(run_dir: Path, name: str) -> Path:
    """Makes a new directory to write a checkpoint into.

    Its name is new each time, because writers of a killed process may still be busy in theirs.
    """
    writing = checkpoint_dir(run_dir) / f"{_WRITING}{name}-{secrets.token_hex(4)}"
    writing.mkdir()
    return writing


def publish(writing: Path, name: str, digests: dict[str, manifest.FileDigest]) -> Path:
    """Writes the manifest and gives a checkpoint its name, which makes it complete.

    Args:
        writing: holds every file but the manifest.
        name: STAGE-STEP.
        digests: of the files that the writers made; the few other files are read here.

    Raises:
        OSError: the disk is full or read-only.
    """
    run_dir, target = writing.parent.parent, writing.parent / name
    others = [path for path in writing.iterdir() if path.name not in digests]
    for path in others:
        _sync(path)
    digests = digests | {path.name: manifest.digest_file(path) for path in others}
    newest = max((sequence for sequence, _ in _complete(run_dir)), default=0)
    content = manifest.Manifest(int(newest) + 1, dict(sorted(digests.items())))
    manifest.write_manifest(content, writing)
    _sync(writing)
    if target.exists():
        remove(target)
    os.replace(writing, target)
    _sync(target.parent)
    return target


def prune(run_dir: Path, config: CheckpointConfig) -> None:
    """Removes old checkpoints, but not the newest, and not yet one that some process is reading.

    A checkpoint that cannot be removed is a warning, because training does not depend on it.
    """
    for old in complete_checkpoints(run_dir)[: -config.keep_last]:
        try:
            if config.keep_stage_ends and read_state(old).ends_stage:
                continue
            if is_being_read(old):
                logger.info("keeping %s for now: it is being read", old)
                continue
            remove(old)
        except (OSError, CheckpointError) as error:
            logger.warning("cannot remove the old checkpoint %s: %s", old, error)


def remove(directory: Path) -> None:
    """Removes a directory. It is renamed first, so that nothing half-removed looks like a checkpoint."""
    going = directory.with_name(_REMOVING + directory.name.removeprefix(_REMOVING))
    if going != directory:
        os.replace(directory, going)
    shutil.rmtree(going)


def give_up(writing: Path) -> None:
    """Removes what a failed save has written. If that fails too, it only warns."""
    try:
        remove(writing)
    except OSError as error:
        logger.warning("cannot remove %s: %s", writing, error)


def disk_trouble(directory: Path) -> str | None:
    """Returns the file system's error for writing one more MiB, or None.

    Libraries that write for us do not always pass the error on.
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return str(error)
    return None


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that later starts ignore it. Nothing is deleted."""
    aside = checkpoint.with_name(_DAMAGED + checkpoint.name)
    if aside.exists():
        remove(aside)
    return checkpoint.rename(aside)


@contextmanager
def being_read(checkpoint: Path) -> Iterator[None]:
    """Keeps `prune` of any process from removing a checkpoint. A killed reader no longer keeps it.

    Raises:
        CheckpointError: it was removed before it could be opened.
    """
    try:
        file = (checkpoint / manifest.FILE_NAME).open("rb")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} was removed by the run that made it; start again to get its newest one"
        ) from error
    with file:
        _lock(file.fileno(), fcntl.LOCK_SH)
        yield


def is_being_read(checkpoint: Path) -> bool:
    """Returns whether some process, this one included, is inside `being_read`."""
    with (checkpoint / manifest.FILE_NAME).open("rb+") as file:
        return not _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock(descriptor: int, operation: int) -> bool:
    """Applies `operation` of flock. Returns False when another process has the lock."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some file systems have no locks (Lustre without `flock`): readers are not protected there.
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True


def _sync(path: Path) -> None:
    """Makes a file's bytes, or a directory's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
