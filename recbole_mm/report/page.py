"""Render what was gathered into one self-contained HTML file: Jinja2 escapes all that comes from data, Plotly draws, nothing is loaded."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, select_autoescape
from plotly.offline import get_plotlyjs

from recbole_mm.report.collect import Gathered

_COLOURS = ["#3366cc", "#dc7b1f", "#2e9e5b", "#a3439c", "#c9342f", "#148a9c", "#8a6d1f", "#6b5bd2", "#5f6b73", "#b5457a"]
_COLD = (
    ("cold", "warm"),
    "Cold and warm items",
    "where the right item never (cold) or ever (warm) occurred in training.",
)
_POPULARITY = (
    ("rare", "middling", "popular"),
    "Rare and popular items",
    "by popularity of the right item: each of the three groups has a third of the training interactions.",
)


def render(page: Gathered, metric: str | None = None) -> str:
    """The page as HTML.

    Args:
        page: see :func:`recbole_mm.report.collect.gather`.
        metric: the metric of the charts; the first one that every run has by default.
    """
    metrics = _common_metrics(page.runs)
    metric = metric or (metrics[0] if metrics else None)
    made = (
        _curves(page.runs),
        _against_time(page.runs, metric),
        _groups(page.runs, metric, *_COLD),
        _groups(page.runs, metric, *_POPULARITY),
        _spreads(page.spreads, metric),
        _ablation(page.runs, metric),
        _sizes(page.cards),
        _coverage(page.cards),
    )
    figures = [figure for figure in made if figure] + _search_figures(page)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    return environment.get_template("page.html").render(
        page=page,
        metrics=metrics,
        rows=_rows(page.runs, metrics),
        figures=[{"title": title, "note": note, "id": f"figure{n}"} for n, (title, note, _) in enumerate(figures)],
        figure_data=_script_json([json.loads(figure.to_json()) for _, _, figure in figures]),
        data=_script_json({"items": page.items, "users": page.users}),
        plotly=get_plotlyjs() if figures else "",
    )


def _script_json(value: Any) -> str:
    """JSON that is safe inside a script element whatever the strings in it hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    return (
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


def _number(value: Any, digits: int = 4) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def _common_metrics(runs: Iterable[dict]) -> list[str]:
    sets = [list(run["test"]) for run in runs]
    return [name for name in sets[0] if all(name in other for other in sets)] if sets else []


def _rows(runs: list[dict], metrics: list[str]) -> list[dict[str, Any]]:
    """One line per dataset and label: mean and spread over seeds; missing values stay missing."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        groups.setdefault((run["dataset"], run["label"]), []).append(run)
    rows = []
    for (dataset, name), members in groups.items():
        cells = []
        for metric in metrics:
            values = [m["test"][metric] for m in members if m["test"][metric] is not None]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            cells.append({"mean": float(np.mean(values)) if values else None, "spread": spread, "best": False})
        seconds, memory = [m["time"]["total_s"] for m in members], [m["memory"]["peak_rss_mb"] for m in members]
        rows.append(
            {
                "dataset": dataset,
                "label": name,
                "cells": cells,
                "seeds": len(members),
                "seconds": float(np.mean(seconds)),
                "memory": float(np.mean(memory)),
            }
        )
    for column in range(len(metrics)):
        for dataset in {row["dataset"] for row in rows}:
            known = [row for row in rows if row["dataset"] == dataset and row["cells"][column]["mean"] is not None]
            if known:
                max(known, key=lambda row: row["cells"][column]["mean"])["cells"][column]["best"] = True
    return rows


def _layout(figure: go.Figure, x: str, y: str) -> go.Figure:
    figure.update_layout(
        xaxis_title=x, yaxis_title=y, margin={"l": 60, "r": 20, "t": 20, "b": 50}, legend={"orientation": "h", "y": -0.2}, height=380,
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"family": "system-ui, sans-serif", "color": "#808890"},
    )  # fmt: skip
    figure.update_xaxes(gridcolor="rgba(128,136,144,.25)", zerolinecolor="rgba(128,136,144,.4)")
    figure.update_yaxes(gridcolor="rgba(128,136,144,.25)", zerolinecolor="rgba(128,136,144,.4)")
    return figure


def _colours(runs: list[dict]) -> dict[str, str]:
    names = list(dict.fromkeys(run["label"] for run in runs))
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def _curves(runs: list[dict]):
    figure, colours, seen = go.Figure(), _colours(runs), set()
    for run in runs:
        points = [(e["epoch"], e["valid_score"]) for e in run.get("epochs", []) if e.get("valid_score") is not None]
        if len(points) < 2:
            continue
        epochs, values = zip(*points)
        first = run["label"] not in seen
        seen.add(run["label"])
        figure.add_scatter(
            x=epochs,
            y=values,
            mode="lines",
            name=run["label"],
            legendgroup=run["label"],
            showlegend=first,
            opacity=0.8,
            line={"color": colours[run["label"]]},
        )
    if not seen:
        return None
    return "Learning curves", "Validation score by epoch, one line per run.", _layout(figure, "epoch", "validation score")


def _against_time(runs: list[dict], metric: str | None):
    if not metric:
        return None
    figure, colours = go.Figure(), _colours(runs)
    for name in colours:
        mine = [run for run in runs if run["label"] == name and run["test"].get(metric) is not None]
        figure.add_scatter(
            x=[run["time"]["total_s"] for run in mine],
            y=[run["test"][metric] for run in mine],
            mode="markers",
            name=name,
            marker={"size": 11, "color": colours[name]},
        )
    figure.update_xaxes(type="log")
    return "Quality against time", f"Test {metric} over the seconds of the whole run.", _layout(figure, "seconds", metric)


def _groups(runs: list[dict], metric: str | None, wanted: tuple[str, ...], title: str, note: str):
    """Bars of a metric on groups of items, by model."""
    names = [name for name in wanted if any((run.get("test_groups") or {}).get(name, {}).get(metric) is not None for run in runs)]
    if not metric or not names:
        return None
    figure, labels = go.Figure(), list(_colours(runs))
    for name in names:
        means = []
        for text in labels:
            values = [
                v for run in runs if run["label"] == text and (v := (run.get("test_groups") or {}).get(name, {}).get(metric)) is not None
            ]
            means.append(float(np.mean(values)) if values else None)
        figure.add_bar(x=labels, y=means, name=f"{name} items")
    return title, f"Test {metric} {note}", _layout(figure, "", metric)


def _spreads(spreads: list[dict], metric: str | None):
    """The metric over users, from those served worst to those served best; one run of each model."""
    shown = [spread for spread in spreads if metric in spread["curves"]]
    if not shown:
        return None
    figure, several = go.Figure(), len({spread["dataset"] for spread in shown}) > 1
    for number, spread in enumerate(shown):
        curve = spread["curves"][metric]
        figure.add_scatter(
            x=np.linspace(0, 100, len(curve)).tolist(),
            y=curve,
            mode="lines",
            name=f"{spread['label']} ({spread['dataset']})" if several else spread["label"],
            line={"color": _COLOURS[number % len(_COLOURS)], "shape": "hv"},
        )
    note = f"Test {metric} of each user, users in the order of their value; one run of each model."
    return "Spread over users", note, _layout(figure, "% of the users", metric)


def _sizes(cards: list[dict]):
    """How many interactions users and items have: quartiles and extremes, as the card of the data knows them."""
    kinds = [(key, text) for key, text in (("per_user", "users"), ("per_item", "items")) if any(card.get(key) for card in cards)]
    if not kinds:
        return None
    figure = go.Figure()
    for key, text in kinds:
        have = [card for card in cards if card.get(key)]
        figure.add_box(
            x=[card["name"] for card in have],
            lowerfence=[card[key]["min"] for card in have],
            q1=[card[key]["quarter"] for card in have],
            median=[card[key]["median"] for card in have],
            q3=[card[key]["three quarters"] for card in have],
            upperfence=[card[key]["max"] for card in have],
            mean=[card[key]["mean"] for card in have],
            name=text,
        )
    figure.update_layout(boxmode="group")
    figure.update_yaxes(type="log")
    note = "Boxes: a quarter of the users (items) have fewer interactions than their lower edge, a quarter more than their upper one."
    return "Data: interactions per user and item", note, _layout(figure, "", "interactions")


def _coverage(cards: list[dict]):
    """Which share of the items has pictures, texts, features, and how many are cold."""
    shares: dict[str, dict[str, float]] = {}
    for card in cards:
        items, row = max(card["items"], 1), shares.setdefault(card["name"], {})
        if card["pictures"]:
            row["pictures"] = card["pictures"]["items"] / items
        row |= {f"text: {field}": about["items"] / items for field, about in card["texts"].items()}
        row |= {f"features: {name}, {m}": about["items"] / items for name, found in card["features"].items() for m, about in found.items()}
        if card["cold"]:
            row["without training interaction"] = card["cold"]["items"] / items
    names = list(dict.fromkeys(name for row in shares.values() for name in row))
    if not names:
        return None
    figure = go.Figure()
    for dataset, row in shares.items():
        figure.add_bar(y=names, x=[100 * row[name] if name in row else None for name in names], name=dataset, orientation="h")
    figure = _layout(figure, "% of the items", "")
    figure.update_layout(height=140 + 32 * len(names) * max(1, len(shares)), margin={"l": 220})
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(range=[0, 100])
    return "Data: what items come with", "", figure


def _ablation(runs: list[dict], metric: str | None):
    """Models that were run with several choices of modalities."""
    groups: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if run.get("modalities") and metric and run["test"].get(metric) is not None:
            groups.setdefault(run["model"], {}).setdefault("+".join(run["modalities"]), []).append(run["test"][metric])
    groups = {model: choices for model, choices in groups.items() if len(choices) > 1}
    if not groups:
        return None
    figure = go.Figure()
    for choice in dict.fromkeys(c for choices in groups.values() for c in choices):
        figure.add_bar(x=list(groups), y=[float(np.mean(groups[m][choice])) if choice in groups[m] else None for m in groups], name=choice)
    return "Modalities", f"Test {metric} with each choice of item features.", _layout(figure, "", metric)


def _search_figures(page: Gathered) -> list:
    """Optuna's own plots of each search."""
    import optuna
    from optuna import visualization

    from recbole_mm.tuning.search import open_storage, quiet

    figures = []
    quiet()
    for folder in page.searches:
        if not (folder / "study.db").is_file():
            page.notes.append(f"{folder}: the study lies in another storage; its plots are not shown.")
            continue
        storage = open_storage(f"sqlite:///{folder / 'study.db'}")
        for summary in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=summary, storage=storage)
            done = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and t.value is not None and t.params]
            figures.append(
                (
                    f"Search {summary}: values of the trials",
                    "",
                    _layout(visualization.plot_optimization_history(study), "trial", "validation score"),
                )
            )
            if len(done) > 1:
                figures.append((f"Search {summary}: each parameter", "", _layout(visualization.plot_slice(study), "", "validation score")))
    return figures
