"""`python -m robustlip`, and the command `robustlip`: the command line as a process of its own."""

from __future__ import annotations

import os
import sys
import traceback

from robustlip.cli import main


def run() -> None:
    """robustlip.cli.main, and the end of the process with its exit code: 70 for an error that is none of ours, since 1 is an answer.

    One of several processes of torchrun ends without the interpreter's own clearing up: threads of gloo that outlive it abort the process now
    and then (torch 2.13), which torchrun takes for a failed run. All files are written by then.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        try:
            main()
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
