"""Tables of a benchmark: mean and spread over seeds, best in bold, significance over users; Markdown, LaTeX and CSV."""

import csv
import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from recbole.evaluator.register import metrics_dict

from recbole_mm.benchmark.plan import Cell, Plan
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
    model: str = ""
    kind: str = ""  # what distinguishes the rows of one model

    def mean(self, metric: str) -> float:
        return float(np.mean(self.metrics[metric])) if self.metrics.get(metric) else float("nan")

    def spread(self, metric: str) -> float:
        """Sample standard deviation over seeds; NaN for one seed."""
        values = self.metrics.get(metric) or []
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def collect(plan: Plan, folder: Path) -> dict[str, list[Row]]:
    """Title of each table (the dataset's name, with the block's before it) -> rows in the order of the plan; one without results says why."""
    stored = {cell: _result(folder, cell) for cell in plan.cells}
    tables: dict[str, list[Row]] = {}
    for table in plan.tables:
        rows: dict[str, Row] = {}
        for cell in table.cells:
            row = rows.setdefault(cell.group, Row(cell.group, [], {}, [], [], [], model=cell.model, kind=cell.kind))
            record, run = stored[cell]
            if not run:
                rows[cell.group] = dataclasses.replace(row, reason=record["error"])
                continue
            row.seeds.append(cell.seed)
            for name, value in record["test"].items():
                row.metrics.setdefault(name, []).append(float("nan") if value is None else value)
            row.seconds.append(record["time"]["total_s"])
            row.memory.append(record["memory"]["peak_rss_mb"])
            row.runs.append(run)
        known = tables.setdefault(table.title, [])
        known += [row for row in rows.values() if row.group not in {other.group for other in known}]
    return tables


def _result(folder: Path, cell: Cell) -> tuple[dict, str]:
    """The record of a cell and its run directory; the latter is empty where there is no result."""
    record = (stored := read_cell(folder, cell) or {}).get("record", {})
    try:
        if is_done(folder, cell, cell.key()):
            return record, str(folder / stored["run_dir"])
    except UserError as error:
        record = {"error": record.get("error") or str(error)}
    return {"error": record.get("error") or "not run yet"}, ""


def significance(rows: list[Row], metric: str, baseline: str | None, within: str | None = None) -> list[Comparison]:
    """The best row against every other, or every row against `baseline`; paired over users, Holm-corrected over all of them.

    Args:
        rows: of one table.
        metric: e.g. NDCG@10; what precedes a slash (VIP5's task) names no other values of a user.
        baseline: a row; with `within`, what follows the model's name in one.
        within: "model": rows of one model are compared with each other only.

    Raises:
        UserError: when two rows were tested on other users or targets.
    """
    usable = [row for row in rows if row.runs]
    pairs: list[tuple[str, str]] = []
    for members in (
        [[row for row in usable if row.model == model] for model in dict.fromkeys(r.model for r in usable)] if within else [usable]
    ):
        base = next((row.group for row in members if baseline is not None and baseline == (row.kind if within else row.group)), None)
        if base is not None:
            pairs += [(row.group, base) for row in members if row.group != base]
        elif members:
            best = max(members, key=lambda row: _rank(row, metric)).group
            pairs += [(best, row.group) for row in members if row.group != best]
    named = {name for pair in pairs for name in pair}
    values = {
        row.group: mean_over_runs([Path(run) / "per_user.npz" for run in row.runs], metric.lower().rpartition("/")[2])
        for row in usable
        if row.group in named
    }
    return compare(values, pairs)


def _rank(row: Row, metric: str) -> float:
    value = row.mean(metric.lower()) if metric.lower() in row.metrics else row.mean(metric.lower().rpartition("/")[2])
    return -np.inf if np.isnan(value) else value


def all_tests(plan: Plan, tables: dict[str, list[Row]], say=print) -> dict[str, list[Comparison]]:
    """The comparisons of every table; where users or targets differ, the reason is said and there are none."""
    tests = {}
    for table in {table.title: table for table in plan.tables}.values():
        try:
            tests[table.title] = significance(tables[table.title], table.metric, table.baseline, table.within)
        except UserError as error:
            say(f"{table.title}: no significance tests. {error}")
            tests[table.title] = []
    return tests


def markdown(tables: dict[str, list[Row]], plan: Plan, tests: dict[str, list[Comparison]]) -> str:
    """The report page of the benchmark as Markdown."""
    lines = [f"# {plan.name}", "", _protocol(plan), ""]
    described = {table.title: table for table in plan.tables}
    for dataset, rows in tables.items():
        table, names = described[dataset], _metrics(rows)
        best = {name: _best(rows, name, table.within) for name in names}
        lines += [f"## {dataset}", "", "| model | " + " | ".join(names) + " | seconds | MiB | seeds |", "|---|" + "---|" * (len(names) + 3)]
        for row in rows:
            if not row.runs:
                lines.append(f"| {row.group} | " + " | ".join(["–"] * (len(names) + 2)) + f" | {row.reason} |")
                continue
            cells = [_cell(row, name, row.group in best[name], "**{}**") for name in names]
            lines.append(
                f"| {row.group} | " + " | ".join(cells) + f" | {np.mean(row.seconds):.0f} | {np.mean(row.memory):.0f} | {len(row.seeds)} |"
            )
        lines.append("")
        if tests.get(dataset):
            lines += [f"Paired t-tests over users, {table.metric}, Holm-Bonferroni over {len(tests[dataset])} comparisons:", ""]
            lines += ["| comparison | difference | t | p | corrected p | effect d_z | users |", "|---|---|---|---|---|---|---|"]
            for c in tests[dataset]:
                lines.append(
                    f"| {c.first} − {c.second} | {c.difference:+.4f} | {c.t:.2f} | {c.p:.2g} | {c.p_holm:.2g}{' *' if c.p_holm < 0.05 else ''} | {c.effect:+.3f} | {c.users} |"
                )
            lines.append("")
    return "\n".join(lines)


def latex(tables: dict[str, list[Row]], plan: Plan, tests: dict[str, list[Comparison]]) -> str:
    """One booktabs table per table; a star marks rows that differ from the best one (or the baseline) at 5 % after correction."""
    out = []
    described = {table.title: table for table in plan.tables}
    for dataset, rows in tables.items():
        table, names = described[dataset], _metrics(rows)
        best = {name: _best(rows, name, table.within) for name in names}
        sure = {c.first if table.baseline else c.second for c in tests.get(dataset, []) if c.p_holm < 0.05}
        out += [r"\begin{table}", r"\centering", r"\begin{tabular}{l" + "r" * len(names) + "}", r"\toprule"]
        out += ["Model & " + " & ".join(_tex(name) for name in names) + r" \\", r"\midrule"]
        for row in rows:
            if row.runs:
                cells = [_cell(row, name, row.group in best[name], r"\textbf{{{}}}").replace("±", r"$\pm$") for name in names]
                out.append(f"{_tex(row.group)}{'$^*$' if row.group in sure else ''} & " + " & ".join(cells) + r" \\")
        out += [
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{_tex(dataset)}: mean and standard deviation over seeds; * differs from {'the baseline' if table.baseline else 'the best'} in {_tex(table.metric)} (paired t-test over users, Holm-corrected, 5\%).}}",
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


def _best(rows: list[Row], metric: str, within: str | None) -> set[str]:
    """The best row, or the best one of each model."""
    kind = metrics_dict.get(metric.rpartition("/")[2].partition("@")[0])
    sign = -1 if getattr(kind, "smaller", False) else 1
    known = [row for row in rows if not np.isnan(row.mean(metric))]
    groups = [[row for row in known if row.model == model] for model in dict.fromkeys(row.model for row in known)] if within else [known]
    return {max(members, key=lambda row: sign * row.mean(metric)).group for members in groups if members}


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
