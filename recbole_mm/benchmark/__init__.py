"""Benchmarks: many runs under one protocol, with statistics."""

from pathlib import Path

from recbole_mm.errors import UserError, nearest
from recbole_mm.files import write_text
from recbole_mm.parsing import parse_arguments, parse_value
from recbole_mm.paths import properties_dir

_LISTS = ("models", "datasets", "encoders", "paradigms", "modalities", "seeds")


def main(arguments: list[str]) -> int:
    """``recbole-mm benchmark properties/benchmark/<name>.yaml [--out=saved/benchmark-<name>] [--jobs=N] [--key=value ...]``, or from flags:
    ``recbole-mm benchmark --models=BPR,VBPR --datasets=shop --encoders=classic --seeds=1,2,3``: run every cell that is not done yet, and
    write tables in Markdown, LaTeX and CSV with significance tests. Started again, it continues.
    """
    from recbole_mm.benchmark.plan import read_plan
    from recbole_mm.benchmark.runner import run_benchmark
    from recbole_mm.benchmark.tables import as_csv, collect, latex, markdown, significance
    from recbole_mm.parsing import load_yaml

    file = arguments[0] if arguments and not arguments[0].startswith("--") else None
    given = {
        key: parse_value(value) if isinstance(value, str) else value
        for key, value in parse_arguments(arguments[1:] if file else arguments).items()
    }
    out, jobs = given.pop("out", None), given.pop("jobs", None)
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise UserError(f"--jobs: expected a whole number above 0, got {jobs!r}.")
    body = load_yaml(_find(file)) if file else {}
    body.setdefault("name", Path(file).stem if file else "benchmark")
    for key in _LISTS:
        if key in given:
            value = given.pop(key)
            body[key] = (
                [parse_value(part) for part in value.split(",")]
                if isinstance(value, str)
                else value
                if isinstance(value, list)
                else [value]
            )
    for key in ("metric", "baseline", "name"):
        if key in given:
            body[key] = given.pop(key)
    body["settings"] = {**(body.get("settings") or {}), **given}
    plan = read_plan(body)
    folder = Path(out or f"saved/benchmark-{plan.name}")
    failed = run_benchmark(plan, folder, jobs)
    tables = collect(plan, folder)
    tests = {dataset: significance(rows, plan.metric, plan.baseline) for dataset, rows in tables.items()}
    text = markdown(tables, plan, tests)
    write_text(folder / "table.md", text)
    write_text(folder / "table.tex", latex(tables, plan, tests))
    write_text(folder / "table.csv", as_csv(tables))
    print(f"\n{text}\nTables: {folder}/table.md, .tex, .csv. Cells: {folder}/cells/")
    if failed:
        print(f"{len(failed)} of {len(plan.cells)} cells failed; the reasons stand in the table. Run the same command again after mending.")
    return 1 if failed else 0


def _find(file: str) -> Path:
    """A path, or the name of a ready benchmark in properties/benchmark/."""
    for path in (Path(file), properties_dir() / "benchmark" / f"{file}.yaml"):
        if path.is_file():
            return path
    ready = [path.stem for path in (properties_dir() / "benchmark").glob("*.yaml")]
    raise UserError(f"There is no benchmark file {file}.{nearest(file, ready)} Ready ones: {', '.join(sorted(ready)) or 'none'}.")
