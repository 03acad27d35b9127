"""`robustlip vnncomp`: decide properties of VNN-LIB files, with the results of VNN-COMP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from robustlip.cli.options import Seed
from robustlip.errors import BadInput


def vnncomp(
    paths: Annotated[list[Path], typer.Argument(metavar="NETWORK PROPERTY RESULT | FOLDER RESULTS", help="files, or a folder with instances.csv")],
    timeout: Annotated[Optional[float], typer.Option("--timeout", help="seconds per property  [default: as in instances.csv, or 300]")] = None,
    seed: Seed = 0,
) -> None:
    """Decide a property of a network: unsat (it holds, proved), sat (with a counterexample), unknown or timeout.

    For NETWORK.onnx PROPERTY.vnnlib the result file has the format of VNN-COMP. For a folder, RESULTS gets a line
    network,property,result,seconds per instance, and each counterexample is written to a file in the same folder.
    """
    from robustlip.cli.console import Progress
    from robustlip.data.vnnlib import read_instances
    from robustlip.files import write_text
    from robustlip.models.zoo import load
    from robustlip.vnncomp import DEFAULT_SECONDS, VIOLATED, decide_files

    if timeout is not None and not 0 < timeout < 1e6:
        raise BadInput(f"expected --timeout above 0 and below a million, got {timeout}; give a number of seconds")
    if len(paths) not in (2, 3):
        raise BadInput(f"expected NETWORK PROPERTY RESULT, or FOLDER RESULTS, got {len(paths)} paths; see robustlip vnncomp --help")
    if paths[-1].exists() and any(path.exists() and path.samefile(paths[-1]) for path in paths[:-1]):
        raise BadInput(f"expected a new file for results, got {paths[-1].name}, which this command reads; name another file")
    if len(paths) == 3:
        answer = decide_files(paths[0], paths[1], timeout or DEFAULT_SECONDS, seed=seed)
        write_text(paths[2], answer.text())
        print(f"{answer.verdict} ({answer.seconds:.1f} s)" + (f": {answer.why}" if answer.why else ""))
        return
    instances, results = read_instances(paths[0]), paths[1]
    loaded: tuple[Path | None, object] = (None, None)
    lines, count = [], dict.fromkeys(("unsat", "sat", "unknown", "timeout", "error"), 0)
    with Progress() as progress:
        for i, instance in enumerate(instances):
            progress(f"{instance.network.name} · {instance.property.name}", i, len(instances))
            try:
                if loaded[0] != instance.network:
                    loaded = (instance.network, load(instance.network))
                seconds = timeout or instance.seconds or DEFAULT_SECONDS
                answer = decide_files(instance.network, instance.property, seconds, seed=seed, model=loaded[1])  # type: ignore[arg-type]
                verdict, took = answer.verdict, answer.seconds
                if verdict == VIOLATED:
                    write_text(results.with_name(f"{results.stem}.{i}.counterexample"), answer.text())
            except BadInput as error:  # continue with the other instances
                verdict, took = "error", 0.0
                print(f"{instance.network.name} {instance.property.name}: {error}")
            count[verdict] += 1
            lines.append(f"{instance.network.name},{instance.property.name},{verdict},{took:.2f}")
            write_text(results, "\n".join(lines) + "\n")
    print(", ".join(f"{n} {verdict}" for verdict, n in count.items() if n))
