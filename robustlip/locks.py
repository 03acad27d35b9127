"""One writer at a time in a folder."""

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
    """Holds `folder`/.lock while the block runs. what: 'run', 'training', 'sweep', for the sentence. Raises BadInput where another process holds it.

    The system holds the lock for the open file, so it ends with the process however that ends; the file itself stays and says nothing.
    Where there is no such lock (Windows, some network file systems) nothing is held: there one has to look out oneself.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / LOCK
    try:
        # No link is followed, and nothing is written to it: what lies there is whoever's.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise BadInput(f"expected a folder to write to, got {folder}, whose {LOCK} cannot be opened ({error.strerror}); name another") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise BadInput(
                    f"expected a folder that no other process writes to, got {folder}, where a {what} is going on; wait for its end, or name another"
                ) from None
        yield
    finally:
        os.close(handle)
