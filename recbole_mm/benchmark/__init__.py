"""Benchmarks: many runs under one protocol, with statistics."""

from pathlib import Path

from recbole_mm.errors import UserError, nearest
from recbole_mm.files import write_text
from recbole_mm.parsing import parse_arguments, parse_value
from recbole_mm.paths import properties_dir

_LISTS = ("models", "datasets", "encoders", "paradigms", "modalities", "seeds")


def main(arguments: list[str]) -> int:
    """``recbole-mm benchmark properties/benchmark/<name>.yaml [--check] [--out=saved/benchmark-<name>] [--jobs=N] [--key=value ...]``, or from
    flags: ``recbole-mm benchmark --models=BPR,VBPR --datasets=shop --encoders=classic --seeds=1,2,3``: run every cell that is not done yet,
    and write tables in Markdown, LaTeX and CSV with significance tests. Started again, it continues. ``--check`` (or ``--dry-run``) runs
    nothing: it says what there is to do and what is missing, dataset files, pictures, features, weights, and where to get it.
    """
    from recbole_mm.benchmark.plan import read_plan
    from recbole_mm.benchmark.runner import run_benchmark
    from recbole_mm.benchmark.tables import all_tests, as_csv, collect, latex, markdown
    from recbole_mm.parsing import load_yaml

    file = arguments[0] if arguments and not arguments[0].startswith("--") else None
    given = {
        key: parse_value(value) if isinstance(value, str) else value
        for key, value in parse_arguments(arguments[1:] if file else arguments).items()
    }
    out, jobs = given.pop("out", None), given.pop("jobs", None)
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise UserError(f"--jobs: expected a whole number above 0, got {jobs!r}.")
    if out is not None and (isinstance(out, bool) or not isinstance(out, (str, int))):
        raise UserError(f"--out: expected a folder, got {out!r}.")
    check = [given.pop(key) for key in ("check", "dry_run", "dry-run") if key in given]
    if any(not isinstance(value, bool) for value in check):
        raise UserError(f"--check takes no value, got {next(value for value in check if not isinstance(value, bool))!r}.")
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
            for block in (
                body["blocks"].values() if isinstance(body.get("blocks"), dict) else ()
            ):  # what is asked for here holds for every block
                if isinstance(block, dict) and key in block:
                    block[key] = body[key]
    for key in ("metric", "baseline", "name"):
        if key in given:
            body[key] = given.pop(key)
    _check_flags(given)
    plan = read_plan(body, given)
    folder = Path(str(out or f"saved/benchmark-{plan.name}"))
    if any(check):
        return _check(plan, folder)
    failed = run_benchmark(plan, folder, jobs)
    tables = collect(plan, folder)
    tests = all_tests(plan, tables)
    text = markdown(tables, plan, tests)
    write_text(folder / "table.md", text)
    write_text(folder / "table.tex", latex(tables, plan, tests))
    write_text(folder / "table.csv", as_csv(tables))
    print(f"\n{text}\nTables: {folder}/table.md, .tex, .csv. Cells: {folder}/cells/")
    if failed:
        print(f"{len(failed)} of {len(plan.cells)} cells failed; the reasons stand in the table. Run the same command again after mending.")
    return 1 if failed else 0


def _check_flags(given: dict) -> None:
    """A misspelt flag of this command gets the command's own flags as suggestions."""
    from recbole_mm.config import is_known

    for key, several in (
        ("model", "models"),
        ("dataset", "datasets"),
        ("encoder", "encoders"),
        ("seed", "seeds"),
        ("encoder_training", "paradigms"),
    ):
        if key in given:
            raise UserError(f"benchmark: --{key} is of one run; write --{several}={given[key]} (several separated by commas).")
    for key in given:
        if not is_known(key):
            ours = [*_LISTS, "metric", "baseline", "name", "out", "jobs", "check", "dry-run"]
            raise UserError(
                f"benchmark: unknown flag --{key}.{nearest(key, ours)} It takes {', '.join(f'--{name}' for name in ours)} and any setting of a run."
            )


def _check(plan, folder: Path) -> int:
    """What ``--check`` says; 0 when every cell could run now, else 1."""
    from recbole_mm.benchmark.needs import blocked, describe, needs_of
    from recbole_mm.benchmark.runner import is_done

    needs, wrong = needs_of(plan), {}
    ready, done = [], 0
    for cell in plan.cells:
        if not blocked(needs[cell]):
            try:
                done += is_done(folder, cell, cell.key())
                ready.append(cell)
            except UserError as error:
                wrong.setdefault(str(error), []).append(cell)
    print(f"{plan.name}: {len(plan.cells)} cells in {len(plan.tables)} tables")
    for table in plan.tables:
        print(f"  {table.title}: {len(table.cells)} cells, {len({cell.group for cell in table.cells})} rows")
    lacking = len(plan.cells) - len(ready) - sum(map(len, wrong.values()))
    print(
        f"{done} done before, {len(ready) - done} can run now, {lacking} lack something"
        + (", the rest have wrong settings." if wrong else ".")
    )
    for error, cells in wrong.items():
        print(f"Wrong setting ({len(cells)} cells, {cells[0].group} on {cells[0].dataset} first): {error}")
    if text := describe(needs):
        print(text)
    return 0 if len(ready) == len(plan.cells) else 1


def _find(file: str) -> Path:
    """A path, or the name of a ready benchmark in properties/benchmark/."""
    for path in (Path(file), properties_dir() / "benchmark" / f"{file}.yaml"):
        if path.is_file():
            return path
    ready = [path.stem for path in (properties_dir() / "benchmark").glob("*.yaml")]
    raise UserError(f"There is no benchmark file {file}.{nearest(file, ready)} Ready ones: {', '.join(sorted(ready)) or 'none'}.")
