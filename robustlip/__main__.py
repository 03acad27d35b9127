"""`python -m robustlip` and the command `robustlip`: run the command line in a process of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback

from robustlip.cli import main
from robustlip.cli.console import never_fail_to_encode


def _close_output() -> None:
    """Discard output that could not be written, so that the interpreter does not try again, with an error message, when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run() -> None:
    """Run robustlip.cli.main and end the process with its exit code: 70 for an unexpected exception, because 1 is a regular result.

    A process of torchrun ends without the interpreter's cleanup: threads of gloo sometimes abort the process during the cleanup
    (torch 2.13), which torchrun takes for a failed run. All files are written by then.
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
            # robustlip.files reports errors of files; this error is of stdout or stderr
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
