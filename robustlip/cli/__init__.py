"""The command line: one file per verb; options.py, batches.py and console.py contain what verbs share.

Exit codes: 0 done, 1 the run failed or the answer is no, 2 bad input (one error message on stderr), 3 an attack refutes a proved bound,
70 an internal error, 130 interrupted.
torch, pandas, rich and our modules that need them are imported inside the verbs, so that `robustlip --help` stays fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from robustlip import __version__
from robustlip.cli import attack, audit, certify, demo, evaluate, gate, import_, report, smooth, sweep, table, train, verify, vnncomp, zoo
from robustlip.errors import RobustlipError
from robustlip.user_errors import errors_of

app = typer.Typer(
    help="Certified and observed robustness of Lipschitz-constrained networks, side by side.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
# In the order of the help text.
app.command("demo")(demo.demo)
app.command("eval")(evaluate.evaluate)
app.command("certify", cls=certify.CertifyCommand)(certify.certify)
app.command("attack")(attack.attack)
app.command("train")(train.train)
app.command("table")(table.table)
app.command("report")(report.report)
app.command("audit")(audit.audit)
app.command("import")(import_.import_)
app.command("smooth")(smooth.smooth)
app.command("sweep")(sweep.sweep)
app.command("verify")(verify.verify)
app.command("gate")(gate.gate)
app.command("vnncomp")(vnncomp.vnncomp)
zoo_app = typer.Typer(help="The models that come with robustlip.", no_args_is_help=True, rich_markup_mode=None)
zoo_app.command("list")(zoo.zoo_list)
zoo_app.command("show")(zoo.zoo_show)
app.add_typer(zoo_app, name="zoo")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Errors of robustlip, and errors of a module that an argument names, end in one message and their exit code; any
    other exception keeps its traceback."""
    whole = _whole(sys.argv[1:] if arguments is None else arguments)
    try:
        with errors_of(*whole):
            app(args=whole, prog_name="robustlip")
    except RobustlipError as error:
        print(f"robustlip: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _whole(arguments: Sequence[str]) -> list[str]:
    """Replace `--json` without a file (at the end or before another option) by `--json -`, which means stdout."""
    whole: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        whole.append(argument)
        if argument == "--json" and following != "-" and following.startswith("-"):
            whole.append("-")
    return whole


def _version(asked: bool) -> None:
    if asked:
        print(f"robustlip {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False) -> None:
    pass
