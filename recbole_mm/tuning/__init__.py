"""Hyperparameter search with Optuna."""

from pathlib import Path

from recbole_mm.errors import UserError, nearest
from recbole_mm.parsing import parse_arguments, parse_value
from recbole_mm.paths import properties_dir

OWN = ("params_file", "strategy", "trials", "pruner", "storage", "jobs", "out", "worker", "search_seed", "heartbeat", "config_files")


def main(arguments: list[str]) -> int:
    """``recbole-mm search --model=LATTICE --dataset=tiktok --params-file=properties/tuning/LATTICE.hyper [--strategy=tpe|random|grid]
    [--trials=20] [--pruner=median|hyperband|none] [--jobs=1] [--storage=URL] [--out=saved/search-<model>-<dataset>] [--key=value ...]``:
    search hyperparameters. The defaults are the first trial; selection is on validation, the test is reported once. Started again, it
    continues. ``--storage`` may be any Optuna storage, e.g. postgresql+psycopg://user@host/db; processes that name the same one share the study.
    """
    from recbole_mm.model import find_model
    from recbole_mm.tuning.search import Search, quiet, start_jobs
    from recbole_mm.tuning.space import read_space

    given = parse_arguments(arguments)
    own = {key: given.pop(key) for key in OWN if key in given}
    _check_flags(given, own)
    model, dataset = find_model(str(given.get("model", "VBPR")))[0], str(given.get("dataset", "shop"))
    file = own.get("params_file") or properties_dir() / "tuning" / f"{model}.hyper"
    if not own.get("params_file") and not Path(file).is_file():
        raise UserError(
            f"search needs --params-file=<file>: there is no ready one for {model} in {properties_dir() / 'tuning'}. A line of such a file: learning_rate loguniform -8,-4"
        )
    jobs, trials = _number(own, "jobs", 1), _number(own, "trials", None)
    files = own.get("config_files")
    files = files.replace(",", " ").split() if isinstance(files, str) else files
    quiet()
    settings = {key: parse_value(value) if isinstance(value, str) else value for key, value in given.items()}
    settings = {"state": "error", "show_progress": False, **settings, "model": model, "dataset": dataset}
    search = Search(
        model, dataset, read_space(file), own.get("out") or Path("saved") / f"search-{model}-{dataset}", own.get("strategy", "tpe"), trials,
        own.get("pruner", "median"), own.get("storage"), settings, files, _number(own, "search_seed", 0), _number(own, "heartbeat", 30),
    )  # fmt: skip
    if jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {jobs}.")
    if jobs > 1:
        code = start_jobs(jobs, [word for word in _without_jobs(arguments)])
        if code:
            return code
    if own.get("worker"):
        search.work()
        return 0
    search.work(wait=True)
    result = search.finish()
    counts = ", ".join(f"{n} {state}" for state, n in result["trials"].items() if n)
    print(f"\n{result['model']} on {result['dataset']}: {counts}. Best {result['metric']} on validation {result['best_value']:.4f} with")
    for key, value in result["best_settings"].items() or {"": "the defaults"}.items():
        print(f"  {key}: {value}" if key else f"  {value}")
    print("Test: " + "  ".join(f"{key} {value:.4f}" for key, value in result["test"].items() if value is not None))
    print(f"Ready to use: --config_files {search.folder / 'best.yaml'}. All trials: {search.folder / 'trials.csv'}")
    return 0


def _check_flags(given: dict, own: dict) -> None:
    """A misspelt flag gets this command's flags as suggestions; a flag without its value is not taken for "true"."""
    from recbole_mm.config import is_known

    flags = [key.replace("_", "-") for key in OWN if key != "worker"]
    for key in given:
        if not is_known(key) and key not in str(given.get("extra_keys", "")):
            takes = ", ".join(f"--{flag}" for flag in flags)
            raise UserError(
                f"search: unknown flag --{key.replace('_', '-')}.{nearest(key.replace('_', '-'), [*flags, 'model', 'dataset'])} It takes {takes} and any setting of a run."
            )
    for key in ("params_file", "strategy", "pruner", "storage", "out"):
        if key in own and not isinstance(own[key], str):
            raise UserError(f"search: --{key.replace('_', '-')} needs one value, got {'none' if own[key] is True else own[key]!r}.")


def _number(own: dict, key: str, default: int | None) -> int | None:
    value = parse_value(own[key]) if isinstance(own.get(key), str) else own.get(key, default)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"--{key.replace('_', '-')}: expected a whole number, got {value!r}.")
    return value


def _without_jobs(arguments: list[str]) -> list[str]:
    kept, skipping = [], False
    for word in arguments:
        if word.startswith("--"):
            skipping = word[2:].partition("=")[0] == "jobs"
        if not skipping:
            kept.append(word)
    return kept
