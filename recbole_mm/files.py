"""Files appear whole or not at all."""

import glob
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\.[\w.-]+\.[a-z0-9_]{8}(\.\w+)?")  # what mkstemp makes of the prefix below


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; it replaces `path` when the block ends without an error, else it is removed.

    The temporary name keeps the suffix of `path`, because writers such as ``numpy.save`` and pandas choose by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as stream:  # on disk before the name is: a power cut must not leave an empty file
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes 0600; give what open() would have given
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_leftovers(folder: str | os.PathLike, stem: str = "") -> None:
    """Remove the temporary files of :func:`atomic_path` that a killed process left in `folder`, or only those of files named `stem`.

    Nobody else may be writing them.
    """
    for path in Path(folder).glob(f".{glob.escape(stem)}.*" if stem else ".*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON atomically; NaN is not JSON and raises ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def derived_folder(folder: str | os.PathLike) -> Path:
    """Where files made from a dataset go (feature sets, decoded pictures): its own folder, or one of the user's cache.

    The cache serves folders that cannot be written, are marked read-only (which does not stop root), or belong to an installed package.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return folder
    installed = {"site-packages", "dist-packages"} & set(folder.resolve().parts)
    if not installed and os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222:
        return folder
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "recbole_mm" / f"{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Hold the lock file `path`; other processes of this machine wait. The system lets go of it when a process is killed.

    Windows has no such locks in Python's library; there nobody waits.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        stream = open(path, "a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logging.getLogger().info(f"Another process is at work on {path.stem.lstrip('.')}; waiting for it.")
            fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            if os.fstat(stream.fileno()).st_ino == os.stat(path).st_ino:
                break  # else its last holder removed it while we waited
        except FileNotFoundError:
            pass
        stream.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        stream.close()
