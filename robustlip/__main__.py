"""`python -m robustlip`, and the command `robustlip`: the command line as a process of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback

from robustlip.cli import main
from robustlip.cli.console import never_fail_to_encode


def _close_output() -> None:
    """What could not be written stays unwritten: the interpreter must not try again, and complain, when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run() -> None:
    """robustlip.cli.main, and the end of the process with its exit code: 70 for an error that is none of ours, since 1 is an answer.

    One of several processes of torchrun ends without the interpreter's own clearing up: threads of gloo that outlive it abort the process now
    and then (torch 2.13), which torchrun takes for a failed run. All files are written by then.
    """
    never_fail_to_encode(sys.stdout, sys.stderr)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        try:
            main()
            sys.stdout.flush()
        except OSError as error:
            if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
                traceback.print_exc()
                sys.exit(70)
            # Files are written by robustlip.files, which says which one: this is stdout or stderr.
            _close_output()
            with contextlib.suppress(OSError):
                print(f"robustlip: expected to write all output, got {error.strerror!r}; free some space, or send it elsewhere", file=sys.stderr)
            sys.exit(1)
        except Exception:
            traceback.print_exc()
            sys.exit(70)
        return
    code: object = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    run()
