"""`robustlip zoo list` and `robustlip zoo show`: the models that come with robustlip."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from robustlip.cli.options import Json


def zoo_list(json: Json = None) -> None:
    """List the models."""
    from robustlip.cli.console import Out
    from robustlip.eval.tables import DASH, percent
    from robustlip.models import zoo

    out = Out(json)
    cards = {name: zoo.card(name) for name in zoo.names()}
    out.json({"models": [{"name": name, **card} for name, card in cards.items()]})
    wide = out.console().width >= 100
    rows = [
        [
            name,
            str(card.get("data", DASH)) + (f" ({card['data_note']})" if card.get("data_note") else ""),
            percent(card.get("val_accuracy")),
            str(card.get("parameters", DASH)),
            *([str(card.get("weights_sha256", DASH))[:12]] if wide else []),
        ]
        for name, card in cards.items()
    ]
    out.table("zoo", ["Model", "Data", "Validation\nacc. (%)", "Parameters", *(["Weights, SHA-256"] if wide else [])], rows)


def zoo_show(name: Annotated[str, typer.Argument(help="a zoo name")], json: Json = None) -> None:
    """Print the card of one model: recipe, data, accuracy, caveats, and its sound bound, which is computed from the weights."""
    from robustlip.cli.console import Out
    from robustlip.models import zoo

    out = Out(json)
    card: dict[str, Any] = zoo.card(name)
    card |= {"sound_bound": zoo.sound_bound(name)}
    out.json({"name": name, **card})
    aside = ("name", "history", "bound", "constrained_norms_rms")
    shown = {key: value for key, value in card.items() if key not in aside and value != ""}
    if "history" in card:
        shown["history"] = "--json has it"
    out.table(name, ["", ""], _flat(shown))


def _flat(card: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in card.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", f"{value:.6g}" if type(value) is float else str(value)))
    return rows
