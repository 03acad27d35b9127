"""Locks a folder, so that only one process writes into it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robustlip.errors import BadInput

LOCK = ".lock"


@contextmanager
def sole_writer(folder: Path, what: str) -> Iterator[None]:
    """Holds `folder`/.lock while the block runs. what: 'run', 'training', 'sweep', for the message. Raises BadInput if another process holds it.

    The operating system ties the lock to the open file, so it is released when the process ends, however it ends; the file itself remains.
    On systems without such locks (Windows, some network file systems) nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / LOCK
    try:
        # Links are not followed, and nothing is written to the file, because an existing file may belong to someone else.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise BadInput(f"expected a folder to write to, got {folder}, whose {LOCK} cannot be opened ({error.strerror}); name another") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise BadInput(
                    f"expected a folder that no other process writes to, got {folder}, in which a {what} is running; wait, or name another"
                ) from None
        yield
    finally:
        os.close(handle)
