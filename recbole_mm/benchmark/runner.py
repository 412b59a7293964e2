"""Run the cells of a benchmark: what is done is skipped, what fails is recorded, several at a time within cores and memory."""

import concurrent.futures
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from recbole_mm.benchmark.needs import blocked, combine, describe, needs_of
from recbole_mm.benchmark.plan import Cell, Plan
from recbole_mm.errors import UserError
from recbole_mm.files import write_json

_MEMORY_PER_CELL = 2 << 30  # bytes kept free for each further cell that runs at the same time


def cell_file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.slug}.json"


def read_cell(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The stored result of a cell, or None where there is none that can be read."""
    try:
        return json.loads(cell_file(folder, cell).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_done(folder: Path, cell: Cell, key: str) -> bool:
    """Whether the cell has a finished result of exactly these settings, with its per-user values."""
    stored = read_cell(folder, cell)
    return bool(
        stored
        and stored.get("key") == key
        and stored["record"].get("status") == "finished"
        and (folder / stored["run_dir"] / "per_user.npz").is_file()
    )


def default_jobs() -> int:
    """How many cells fit: one per core, and 2 GiB of free memory each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = _MEMORY_PER_CELL
    return max(1, min(cores, free // _MEMORY_PER_CELL))


def run_benchmark(plan: Plan, folder: Path, jobs: int | None = None, say=print) -> list[Cell]:
    """Run what is not done; return the cells that failed.

    Args:
        plan: see :func:`recbole_mm.benchmark.plan.read_plan`.
        folder: where ``cells/`` and ``runs/`` go.
        jobs: cells at a time; None: as many as cores and memory allow.
        say: called with a line per cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo, failed, lacking = [], [], {}
    needs = needs_of(plan)
    for cell in plan.cells:
        try:
            key = "" if blocked(needs[cell]) else cell.key()
        except UserError as error:
            _store(folder, cell, "", {"status": "failed", "error": str(error)}, "")
            failed.append(cell)
            say(f"failed   {cell.slug}: {error}")
            continue
        if not key:
            failed.append(cell)
            lacking[cell] = needs[cell]
            if (read_cell(folder, cell) or {}).get("record", {}).get("status") != "finished":  # a result stays when its data are taken away
                _store(
                    folder,
                    cell,
                    "",
                    {"status": "failed", "error": "missing: " + "; ".join(n.what for n in needs[cell] if not n.fetched)},
                    "",
                )
        elif not is_done(folder, cell, key):
            todo.append((cell, key))
    waiting = f", {len(lacking)} that lack something" if lacking else ""
    say(f"{len(plan.cells)} cells, {len(plan.cells) - len(todo) - len(failed)} done before, {len(todo)} to run{waiting}")
    if lacking:
        say(describe(lacking))
    jobs = jobs or default_jobs()
    if jobs == 1:
        for cell, key in todo:
            _report(folder, cell, _run_cell(cell, key, str(folder)), failed, say)
        return failed
    _prepare_features(todo, folder, failed)
    queue = list(todo)
    while queue:
        queue = _run_parallel(queue, folder, jobs, failed, say)
    return failed


def _prepare_features(todo, folder: Path, failed) -> None:
    """Make each missing feature set once, before several cells want it at the same time."""
    from recbole_mm.config import Config
    from recbole_mm.encoder.extract import ensure_features

    seen = set()
    for cell, _ in todo:
        if cell.encoder is None and cell.modalities is None and not cell.settings.get("encoder_training"):
            continue
        if (cell.dataset, cell.encoder, cell.paradigm, cell.variant) in seen:
            continue
        seen.add((cell.dataset, cell.encoder, cell.paradigm, cell.variant))
        try:
            combine(cell.settings)
            ensure_features(Config(config_dict=cell.settings))
        except UserError:
            continue  # each of its cells will say why


def _run_parallel(queue, folder: Path, jobs: int, failed, say):
    """Run a queue in worker processes; what was running when a worker died is recorded, the rest is returned to be run by new workers."""
    context = multiprocessing.get_context("spawn")
    left = []
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker, initargs=(jobs,)) as pool:
        futures = {pool.submit(_run_cell, cell, key, str(folder)): (cell, key) for cell, key in queue}
        for future in concurrent.futures.as_completed(futures):
            cell, key = futures[future]
            try:
                _report(folder, cell, future.result(), failed, say)
            except BrokenProcessPool:
                begun = (folder / "runs" / cell.slug).is_dir() and not is_done(folder, cell, key)
                if begun:
                    record = {"status": "failed", "error": "the process was killed, most likely because memory ran out; try --jobs=1"}
                    _store(folder, cell, key, record, "")
                    failed.append(cell)
                    say(f"failed   {cell.slug}: {record['error']}")
                elif not is_done(folder, cell, key):
                    left.append((cell, key))
    return left


def _begin_worker(jobs: int) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def _run_cell(cell: Cell, key: str, folder: str) -> dict[str, Any]:
    """Train and test one cell; a failure is a result too."""
    from recbole_mm.quick_start import run

    root = Path(folder)
    run_dir = root / "runs" / cell.slug
    shutil.rmtree(run_dir, ignore_errors=True)
    fixed = {
        "checkpoint_dir": str(root / "runs"),
        "run_name": cell.slug,
        "state": "error",
        "show_progress": False,
        "tensorboard": False,
        "save_last": False,
    }
    begin = time.perf_counter()
    try:
        combine(cell.settings)
        settings = {**cell.settings, **(_searched(cell, root) if cell.search else {})}
        record = run(config_dict={**settings, **fixed, "checkpoint_seconds": 3600})["record"]
    except Exception as error:
        record = {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}",
            "time": {"total_s": round(time.perf_counter() - begin, 3)},
        }
    _store(root, cell, key, record, str(run_dir.relative_to(root)))
    return record


def _searched(cell: Cell, root: Path) -> dict[str, Any]:
    """Best settings of a search for the cell's row, made once for all its seeds."""
    from recbole_mm.paths import properties_dir
    from recbole_mm.tuning.search import Search, quiet
    from recbole_mm.tuning.space import read_space

    quiet()
    options = dict(cell.search)
    path = options.pop("params_file", None) or properties_dir() / "tuning" / f"{cell.model}.hyper"
    settings = {key: value for key, value in cell.settings.items() if key != "seed"}
    slug = cell.slug.rsplit("-seed", 1)[0]
    quiet_run = {"state": "error", "show_progress": False}
    search = Search(cell.model, cell.dataset, read_space(path), root / "searches" / slug, settings={**settings, **quiet_run}, **options)
    search.work(wait=True)  # cells of other seeds may be working on it
    return search.finish()["best_settings"]


def _store(folder: Path, cell: Cell, key: str, record: dict[str, Any], run_dir: str) -> None:
    described = {"model": cell.model, "dataset": cell.dataset, "encoder": cell.encoder, "paradigm": cell.paradigm}
    described.update(modalities=cell.modalities and list(cell.modalities), variant=cell.variant, seed=cell.seed, group=cell.group)
    write_json(cell_file(folder, cell), {"schema": 1, "key": key, "cell": described, "run_dir": run_dir, "record": record})


def _report(folder: Path, cell: Cell, record: dict[str, Any], failed: list[Cell], say) -> None:
    if record["status"] == "finished":
        first = next(iter(record["test"].items()), ("", 0.0))
        say(f"finished {cell.slug}: test {first[0]} {first[1]:.4f}, {record['time']['total_s']:.0f} s")
    else:
        failed.append(cell)
        say(f"failed   {cell.slug}: {record['error']}")
