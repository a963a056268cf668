"""Files that are written whole or not at all, and places in which one process works at a time."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

UNFINISHED = ".unfinished-"
"""What the names of files and folders begin with while they are written."""


def unfinished(path: Path) -> Path:
    """Where a file or folder is while it is written."""
    return path.with_name(UNFINISHED + path.name)


@contextlib.contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """Yields where to write a file or a folder; it comes to its place when all of it is on the disk.

    In a folder that is there already, files of the same names are replaced and others stay.

    Raises:
        OSError: it cannot be written, for want of space for example. What there was before is whole.
    """
    path = Path(path)
    temporary = unfinished(path)
    _remove(temporary)
    try:
        with in_one_line(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            files = [file for file in (temporary, *temporary.rglob("*")) if file.is_file()]
            for file in files:
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())  # some file systems say only here that they are full
            if path.is_dir():
                for file in files:
                    target = path / file.relative_to(temporary)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, target)
            else:
                os.replace(temporary, path)
    finally:
        _remove(temporary)


def write_text(path: str | Path, text: str) -> None:
    """A text file, UTF-8. Raises OSError as `written`."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append(path: str | Path, line: str) -> None:
    """Add a line at the end of a text file. Raises OSError as `written`; half a line may then be there."""
    with in_one_line(Path(path)), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def remove_unfinished(folder: Path) -> None:
    """What a process left that was killed while it wrote."""
    for path in folder.glob(f"{UNFINISHED}*"):
        _remove(path)


@contextlib.contextmanager
def held(path: str | Path, what: str) -> Iterator[None]:
    """One process at a time: hold ``path``, a file that is made for it, as long as this lasts.

    The operating system gives it back when the process ends, however it ends.

    Args:
        path: of the lock; beside it the holder's name is written.
        what: is held, to begin the error with.

    Raises:
        ValueError: another process holds it; the message says which.
    """
    path = Path(path)
    holder = path.with_name(f"{path.name}-holder")
    lock = FileLock(path, timeout=0)
    try:
        with in_one_line(path):
            lock.acquire()
    except Timeout:
        raise ValueError(
            f"{what}: {_read_holder(holder)} is using it; wait until it has finished, or name another."
        ) from None
    try:
        with in_one_line(holder):
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _read_holder(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8") or "another process"
    except OSError:  # it has only just taken it
        return "another process"


@contextlib.contextmanager
def in_one_line(path: Path) -> Iterator[None]:
    """What the system says of a file that cannot be written, as an OSError of one line."""
    try:
        yield
    except Timeout:
        raise
    except Exception as error:
        # Libraries in Rust have exceptions of their own for what the system says.
        if not (isinstance(error, OSError) or re.search("os error|IoError", str(error))):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"{path} cannot be written ({reason}).") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
