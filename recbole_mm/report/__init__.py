"""Reports: one HTML file about runs, searches or a benchmark, which opens from disk without network."""

from pathlib import Path

from recbole_mm.errors import UserError
from recbole_mm.files import write_text
from recbole_mm.parsing import parse_options


def main(arguments: list[str]) -> int:
    """``recbole-mm report <folder> [<folder> ...] [--out=report.html] [--title=text] [--users=8] [--topk=10] [--metric=ndcg@10]``: write one
    self-contained HTML file about the runs, searches and benchmarks in the folders: summary, learning curves, cold and warm items, failures,
    and for sampled users what each model recommends, as pictures.
    """
    from recbole_mm.report.collect import gather
    from recbole_mm.report.page import render

    count = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    folders = arguments[:count]
    defaults = {"out": "report.html", "title": "", "users": 8, "topk": 10, "metric": None}
    options = parse_options(arguments[count:], defaults, "report")
    if not folders:
        raise UserError("report needs at least one folder: a run directory, or the folder of a search or a benchmark.")
    if not 0 <= options["users"] <= 200 or not 1 <= options["topk"] <= 100:
        raise UserError(f"report: expected --users from 0 to 200 and --topk from 1 to 100, got {options['users']} and {options['topk']}.")
    page = gather(
        folders, options["title"] or "recbole_mm: " + ", ".join(Path(f).name for f in folders[:3]), options["users"], options["topk"]
    )
    out = Path(options["out"])
    write_text(out, render(page, options["metric"]))
    print(
        f"{len(page.runs)} runs, {len(page.searches)} searches, {len(page.failures)} failures: {out} ({out.stat().st_size / 2**20:.1f} MiB)"
    )
    return 0
