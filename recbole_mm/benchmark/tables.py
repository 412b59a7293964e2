"""Tables of a benchmark: mean and spread over seeds, best in bold, significance over users; Markdown, LaTeX and CSV."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recbole_mm.benchmark.plan import Plan
from recbole_mm.benchmark.runner import is_done, read_cell
from recbole_mm.errors import UserError
from recbole_mm.evaluator.significance import Comparison, compare, mean_over_runs


@dataclass(frozen=True)
class Row:
    """One row of a dataset's table: a model with encoder and modalities, over its seeds."""

    group: str
    seeds: list[int]
    metrics: dict[str, list[float]]
    seconds: list[float]
    memory: list[float]
    runs: list[str]
    reason: str = ""  # why there is nothing to show

    def mean(self, metric: str) -> float:
        return float(np.mean(self.metrics[metric])) if self.metrics.get(metric) else float("nan")

    def spread(self, metric: str) -> float:
        """Sample standard deviation over seeds; NaN for one seed."""
        values = self.metrics.get(metric) or []
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def collect(plan: Plan, folder: Path) -> dict[str, list[Row]]:
    """Dataset -> rows in the order of the plan; a row without a finished cell carries the reason."""
    tables: dict[str, dict[str, Row]] = {}
    for cell in plan.cells:
        row = tables.setdefault(cell.dataset, {}).setdefault(cell.group, Row(cell.group, [], {}, [], [], []))
        stored = read_cell(folder, cell)
        try:
            done = is_done(folder, cell, cell.key())
        except UserError as error:
            done, stored = False, {"record": {"error": str(error)}}
        if not done:
            reason = (stored or {}).get("record", {}).get("error") or "not run yet"
            tables[cell.dataset][cell.group] = Row(row.group, row.seeds, row.metrics, row.seconds, row.memory, row.runs, reason)
            continue
        record = stored["record"]
        row.seeds.append(cell.seed)
        for name, value in record["test"].items():
            row.metrics.setdefault(name, []).append(float("nan") if value is None else value)
        row.seconds.append(record["time"]["total_s"])
        row.memory.append(record["memory"]["peak_rss_mb"])
        row.runs.append(str(folder / stored["run_dir"]))
    return {dataset: list(rows.values()) for dataset, rows in tables.items()}


def significance(rows: list[Row], metric: str, baseline: str | None) -> list[Comparison]:
    """The best row against every other, or every row against `baseline`; paired over users, Holm-corrected.

    Raises:
        UserError: when two rows were tested on other users or targets.
    """
    usable = [row for row in rows if row.runs]
    if len(usable) < 2:
        return []
    values = {row.group: mean_over_runs([Path(run) / "per_user.npz" for run in row.runs], metric.lower()) for row in usable}
    if baseline is not None and baseline in values:
        pairs = [(row.group, baseline) for row in usable if row.group != baseline]
    else:
        best = max(usable, key=lambda row: row.mean(metric.lower())).group
        pairs = [(best, row.group) for row in usable if row.group != best]
    return compare(values, pairs)


def markdown(tables: dict[str, list[Row]], plan: Plan, tests: dict[str, list[Comparison]]) -> str:
    """The report page of the benchmark as Markdown."""
    lines = [f"# {plan.name}", "", _protocol(plan), ""]
    for dataset, rows in tables.items():
        names = _metrics(rows)
        best = {name: _best(rows, name) for name in names}
        lines += [f"## {dataset}", "", "| model | " + " | ".join(names) + " | seconds | MiB | seeds |", "|---|" + "---|" * (len(names) + 3)]
        for row in rows:
            if not row.runs:
                lines.append(f"| {row.group} | " + " | ".join(["–"] * (len(names) + 2)) + f" | {row.reason} |")
                continue
            cells = [_cell(row, name, row.group == best[name], "**{}**") for name in names]
            lines.append(
                f"| {row.group} | " + " | ".join(cells) + f" | {np.mean(row.seconds):.0f} | {np.mean(row.memory):.0f} | {len(row.seeds)} |"
            )
        lines.append("")
        if tests.get(dataset):
            lines += [f"Paired t-tests over users, {plan.metric}, Holm-Bonferroni over {len(tests[dataset])} comparisons:", ""]
            lines += ["| comparison | difference | t | p | corrected p | effect d_z | users |", "|---|---|---|---|---|---|---|"]
            for c in tests[dataset]:
                lines.append(
                    f"| {c.first} − {c.second} | {c.difference:+.4f} | {c.t:.2f} | {c.p:.2g} | {c.p_holm:.2g}{' *' if c.p_holm < 0.05 else ''} | {c.effect:+.3f} | {c.users} |"
                )
            lines.append("")
    return "\n".join(lines)


def latex(tables: dict[str, list[Row]], plan: Plan, tests: dict[str, list[Comparison]]) -> str:
    """One booktabs table per dataset; a star marks rows that differ from the best one (or the baseline) at 5 % after correction."""
    out = []
    for dataset, rows in tables.items():
        names = _metrics(rows)
        best = {name: _best(rows, name) for name in names}
        sure = {name for c in tests.get(dataset, []) if c.p_holm < 0.05 for name in (c.first, c.second)}
        out += [r"\begin{table}", r"\centering", r"\begin{tabular}{l" + "r" * len(names) + "}", r"\toprule"]
        out += ["Model & " + " & ".join(_tex(name) for name in names) + r" \\", r"\midrule"]
        for row in rows:
            if row.runs:
                cells = [_cell(row, name, row.group == best[name], r"\textbf{{{}}}").replace("±", r"$\pm$") for name in names]
                out.append(f"{_tex(row.group)}{'$^*$' if row.group in sure else ''} & " + " & ".join(cells) + r" \\")
        out += [
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{_tex(dataset)}: mean and standard deviation over seeds.}}",
            r"\end{table}",
            "",
        ]
    return "\n".join(out)


def as_csv(tables: dict[str, list[Row]]) -> str:
    """Every number: one line per dataset, row and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["dataset", "row", "metric", "mean", "std", "seeds", "values", "mean_seconds", "mean_mib", "reason"])
    for dataset, rows in tables.items():
        for row in rows:
            for name, values in row.metrics.items():
                numbers = [
                    row.mean(name),
                    row.spread(name),
                    len(values),
                    " ".join(map(str, values)),
                    np.mean(row.seconds),
                    np.mean(row.memory),
                ]
                writer.writerow([dataset, row.group, name, *numbers, row.reason])
            if not row.metrics:
                writer.writerow([dataset, row.group, "", "", "", 0, "", "", "", row.reason])
    return out.getvalue()


def _metrics(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def _best(rows: list[Row], metric: str) -> str | None:
    known = [row for row in rows if row.metrics.get(metric)]
    return max(known, key=lambda row: row.mean(metric)).group if known else None


def _cell(row: Row, metric: str, best: bool, bold: str) -> str:
    if not row.metrics.get(metric):
        return "–"
    text = f"{row.mean(metric):.4f}"
    text = bold.format(text) if best else text
    return text if len(row.seeds) < 2 else f"{text} ± {row.spread(metric):.4f}"


def _tex(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text


def _protocol(plan: Plan) -> str:
    split = plan.protocol["eval_args"]
    mask = (
        "history masked for every model"
        if plan.protocol["mask_history"]
        else "RecBole's masks"
        if plan.protocol["mask_history"] is None
        else "nothing masked"
    )
    return f"Split {split.get('split')}, order {split.get('order')}; {mask}; eval_mask {plan.protocol['eval_mask']}. Mean ± standard deviation over seeds."
