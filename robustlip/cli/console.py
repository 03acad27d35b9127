"""Output of the command line: text on one stream, JSON on the other, and a progress bar for work that takes longer than two seconds."""

from __future__ import annotations

import codecs
import os
import re
import sys
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from robustlip.errors import BadInput, first_line
from robustlip.files import ascii_json, json_text, write_text

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

WIDTH = 120
LONGEST_NAME = 32
STDOUT = "-"
_DIGEST = re.compile(r"[0-9a-f]{64}")


# Replacements for characters that the console's encoding does not have. Others become their ASCII parts (₂ becomes 2) or a question mark.
_STANDS_FOR = {
    "∞": "inf", "→": "->", "←": "<-", "↔": "<->", "≥": ">=", "≤": "<=", "≠": "!=", "≈": "~", "·": "-", "•": "*", "–": "-", "—": "--",
    "−": "-", "…": "...", "×": "x", "√": "sqrt", "‖": "||", "ℓ": "l", "∂": "d", "∇": "grad", "∈": "in", "±": "+-", "²": "^2", "³": "^3",
    "⁻": "^-", "“": '"', "”": '"', "‘": "'", "’": "'", "α": "alpha", "β": "beta", "δ": "delta", "Δ": "Delta", "ε": "eps", "λ": "lambda",
    "μ": "mu", "π": "pi", "ρ": "rho", "σ": "sigma", "✓": "ok", "✗": "x", "⚠": "!",
}  # fmt: skip


def _stand_in(character: str) -> str:
    if character in _STANDS_FOR:
        return _STANDS_FOR[character]
    if "\u2500" <= character <= "\u257f":  # lines of tables
        return "|" if character in "│┃║╎╏┆┇┊┋╽╿" else "-"
    if "\u2580" <= character <= "\u259f" or "\u2800" <= character <= "\u28ff":  # bars and spinners
        return "#" if character < "\u2600" else "*"
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_stand_in(character) for character in error.object[error.start : error.end]), error.end


def never_fail_to_encode(*streams: TextIO | None) -> None:
    """Make these streams replace characters that their encoding does not have (cp1252, latin-1, ASCII, lone surrogates in UTF-8) without an error."""
    codecs.register_error("robustlip", _replaced)
    for stream in streams:
        if stream is not None and hasattr(stream, "reconfigure"):  # None: no console; no reconfigure: replaced by a notebook or a test
            stream.reconfigure(errors="robustlip")


def print_json(value: Any) -> None:
    """Print a value as JSON to stdout. A character that the encoding does not have becomes a JSON escape, because a replacement changes the text."""
    text = json_text(value)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeError, LookupError):
        text = ascii_json(text)
    sys.stdout.write(text)
    sys.stdout.flush()


class Out:
    """The output of a verb. json_to: None, '-' for stdout (text then goes to stderr, so that stdout contains only JSON), or a file, which must not
    be one of `inputs`, the files that the verb reads."""

    def __init__(self, json_to: str | None = None, *inputs: str | Path | None) -> None:
        self.json_to = json_to
        if json_to is None or json_to == STDOUT:
            return
        try:
            if Path(json_to).is_dir():
                raise BadInput(f"expected a file for --json, got the folder {json_to}; name a file in it, or - for stdout")
            read = next((str(path) for path in inputs if path is not None and Path(path).exists() and Path(path).samefile(json_to)), None)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:  # an invalid file name
            raise BadInput(f"expected a path that can be written, got {json_to[:200]} ({first_line(error, 80)}); name another path") from None
        if read is not None:
            raise BadInput(f"expected another file for --json than {read}, which this command reads; name a new file")

    def console(self) -> Console:
        from rich.console import Console

        # Piped text has no width of its own, unless COLUMNS gives one: 120 columns fit every table.
        stream = sys.stderr if self.json_to == STDOUT else sys.stdout
        columns = os.environ.get("COLUMNS", "")
        has_width = stream.isatty() or (len(columns) < 5 and columns.isdecimal() and int(columns) >= 20)
        return Console(file=stream, width=None if has_width else WIDTH, highlight=False, soft_wrap=False)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr if self.json_to == STDOUT else sys.stdout, flush=True)

    def json(self, value: Any) -> None:
        """Write the verb's JSON if it was requested. Call this before anything that can still fail."""
        if self.json_to == STDOUT:
            print_json(value)
        elif self.json_to is not None:
            write_text(Path(self.json_to), json_text(value))
            self.say(f"wrote {self.json_to}")

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 2) -> None:
        """Print rows as a table; the first `left` columns are left-aligned.

        If the terminal is too narrow for a hash, the hash is printed below the table on one line, so that it can be copied.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        # Labels are on the first line of a wrapped text; numbers on the last line of a wrapped heading.
        vertical: Literal["top", "bottom"] = "bottom" if headings[0] else "top"
        console = self.console()
        label = max((len(row[0]) for row in rows), default=0)
        below = [row for row in rows if len(row) == 2 and _DIGEST.fullmatch(row[1]) and label + 2 + len(row[1]) > console.width]
        for i, heading in enumerate(headings):
            # Names are never cut; another column wraps.
            name = i == 0 and any(headings) and max((len(row[0]) for row in rows), default=0) <= LONGEST_NAME
            table.add_column(Text(heading), justify="left" if i < left else "right", no_wrap=name, overflow="fold", vertical=vertical)
        for row in rows:
            if row not in below:
                table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        for what, digest in below:
            self.say(f"{what}: {digest}")


class Progress:
    """`with Progress() as progress: progress(label, done, total)`; nothing is shown during the first two seconds."""

    def __init__(self, delay: float = 2.0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=None)
        self._terminal, self._shown, self._label = console.is_terminal, False, ""
        self._timer = threading.Timer(delay, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Progress:
        self._timer.start()
        return self

    def _show(self) -> None:
        self._shown = True
        if self._terminal:
            self._bar.start()

    def __call__(self, label: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=label, completed=done, total=total)
        if self._shown and not self._terminal and label != self._label:  # log lines instead of a bar
            print(f"[{done}/{total}] {label}", file=sys.stderr, flush=True)
        self._label = label

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._bar.stop()


def choose_device(requested: str | None, out: Out) -> str:
    """The device to compute on; its name is printed. Raises BadInput if the requested device is not available."""
    import torch

    if requested is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        try:
            if torch.device(requested).type == "meta":
                raise RuntimeError("tensors on it have no values")
            device = str(torch.device(requested))
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = first_line(error, 120)
            raise BadInput(f"expected a device that torch can use here, got {requested!r} ({reason}); leave --device out or use cpu") from None
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{(n := torch.get_num_threads())} thread{'s' if n > 1 else ''}"
    out.say(f"device: {device} ({name})")
    return device


def radius_summary(radius: np.ndarray, correct: np.ndarray) -> list[tuple[str, str]]:
    """(name, value) of the smallest, median and largest radius over correctly classified samples."""
    import numpy as np

    from robustlip.eval.tables import number

    if not correct.any():
        return [("radius", "no sample is classified correctly")]
    chosen = radius[correct]
    return [(f"{what} radius", number(f(chosen), "none")) for what, f in (("smallest", np.min), ("median", np.median), ("largest", np.max))]
