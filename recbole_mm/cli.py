"""The command line: ``recbole-mm`` and ``run_recbole_mm.py`` are this program."""

import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

from recbole_mm import launch
from recbole_mm.errors import UserError, nearest, out_of_memory

#: command -> (where its main(arguments) is, one line)
COMMANDS = {
    "train": ("recbole_mm.cli:train", "train and test one model (the default)"),
    "search": ("recbole_mm.tuning:main", "search hyperparameters with Optuna"),
    "benchmark": ("recbole_mm.benchmark:main", "compare models x datasets x encoders x seeds, with statistics"),
    "report": ("recbole_mm.report:main", "one HTML file about runs, a search or a benchmark"),
    "recommend": ("recbole_mm.recommend:main", "write a run's recommendations as CSV or Parquet"),
    "explain": ("recbole_mm.explain:main", "VIP5: say in words why an item suits a user"),
    "extract": ("recbole_mm.encoder.extract:main", "encode a dataset's pictures and texts into a feature set"),
    "finetune": ("recbole_mm.encoder.finetune:main", "fine-tune an encoder on a dataset's item pictures and texts"),
    "convert": ("recbole_mm.data.convert:main", "bring data of other formats into RecBole's"),
    "describe": ("recbole_mm.data.card:main", "write a dataset's card: sizes, coverage, cold items"),
    "synthetic": ("recbole_mm.data.synthetic:main", "make a shop with planted tastes, of any size"),
    "perpeft-analysis": ("recbole_mm.report.perpeft_analysis:main", "PerPEFT: parameters added, training time, attention maps"),
}

#: commands whose options depend on a further word, and which explain them themselves
OWN_HELP = ("convert", "synthetic")

HELP = """\
recbole-mm: multimodal recommendation on RecBole

  recbole-mm [train] --model=VBPR --dataset=shop     train and test one model; without arguments exactly this
  recbole-mm <command> --help                        what a command takes
  recbole-mm --list models|datasets|encoders         what there is

Commands
{commands}

Options of train (each setting of RecBole and of the property files works as --key=value or --key value)
  --model            name of a model, ours or RecBole's (default VBPR)
  --dataset          name of a dataset: a folder under --data_path (default shop, bundled)
  --data_path        the folder that holds the dataset's folder (default dataset/)
  --encoder          whose features to use: classic, clip, vlmo, cnn, sentence ... (default: features as they lie in the dataset's folder)
  --encoder_training frozen | finetuned | end2end
  --modalities       which item features to use, e.g. visual,textual (default all)
  --config_files     YAML files with settings, separated by blanks or commas
  --epochs, --learning_rate, --train_batch_size, --seed, --metrics, --topk, --valid_metric, ...
  --eval_mask        all (RecBole's protocol) | train (MMRec's: validation items stay candidates at test)
  --resume           a run directory: continue that run after it was interrupted
  --nproc            number of processes to train with on this machine (default 1)
  --debug            show the traceback of any error

A run leaves its settings, log, checkpoints, result.json and per-user values in a folder under --checkpoint_dir (default saved/).
"""


def help_text() -> str:
    width = max(map(len, COMMANDS))
    return HELP.format(commands="\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()))


def list_things(kind: str) -> str:
    """One line for each model, dataset or encoder there is."""
    from recbole_mm.paths import bundled_dataset_dir, properties_dir

    def first_comment(path: Path) -> str:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                return line.lstrip("# ").strip()
        return ""

    if kind == "models":
        from recbole_mm.model import MODELS, _read_entry_points, recbole_model_names

        _read_entry_points()
        ours = [(name, entry.summary) for name, entry in MODELS.items()]
        theirs = sorted((name, f"RecBole, {kind}") for name, kind in recbole_model_names().items())
        rows = ours + theirs
    elif kind == "datasets":
        files = {path.stem: first_comment(path) for path in (properties_dir() / "dataset").glob("*.yaml")}
        here = {p.name: "" for root in (Path("dataset"), bundled_dataset_dir()) if root.is_dir() for p in root.iterdir() if p.is_dir()}
        rows = sorted({**here, **files}.items())
    elif kind == "encoders":
        rows = sorted((path.stem, first_comment(path)) for path in (properties_dir() / "encoder").glob("*.yaml"))
    else:
        raise UserError(f"--list: expected models, datasets or encoders, got {kind!r}.{nearest(kind, ['models', 'datasets', 'encoders'])}")
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {line}".rstrip() for name, line in rows)


def result_table(record: dict) -> str:
    """The metrics of a run as a readable table: metric by list length, validation beside test, cold and warm items where known."""
    columns = [("valid", record.get("valid") or {}), ("test", record.get("test") or {})]
    columns += [(f"test, {name} items", values) for name, values in (record.get("test_groups") or {}).items() if name in ("cold", "warm")]
    columns = [(title, values) for title, values in columns if values]
    names = list(dict.fromkeys(key for _, values in columns for key in values))
    width = max([len(name) for name in names] + [6])
    lines = [f"{'metric':<{width}}  " + "  ".join(f"{title:>16}" for title, _ in columns)]
    for name in names:
        cells = [values.get(name) for _, values in columns]
        digits = ".0f" if name in ("users", "targets") else ".4f"
        lines.append(f"{name:<{width}}  " + "  ".join(f"{'-' if cell is None else format(cell, digits):>16}" for cell in cells))
    return "\n".join(lines)


def train(arguments: list[str]) -> int:
    """Train and test one model, and print what came out."""
    from recbole_mm.parsing import parse_arguments
    from recbole_mm.quick_start import run

    given = parse_arguments(arguments)
    files = given.pop("config_files", None)
    if isinstance(files, str):
        files = files.replace(",", " ").split()
    resume = given.pop("resume", None)
    if resume is not None:
        if given or files:
            raise UserError(
                f"--resume continues a run with its own settings; remove --{next(iter(given), 'config_files')}, or start a new run."
            )
        if not isinstance(resume, str):
            raise UserError("--resume needs the run directory, e.g. --resume=saved/VBPR-shop-20260101-120000-0a1b2c.")
        outcome = run(resume=resume)
    else:
        external = set(given)
        for file in files or []:
            from recbole_mm.parsing import load_yaml

            external |= set(load_yaml(file))
        words = [word for word in _without(arguments, "config_files")]
        words += [f"--{key}={value}" for key, value in (("model", "VBPR"), ("dataset", "shop")) if key not in external]
        outcome = run(config_file_list=files, arguments=words)
    from recbole_mm.distributed import is_main

    if not is_main():
        return 0
    record = outcome["record"]
    seconds = record["time"]["total_s"]
    print(f"\n{record['model']} on {record['dataset']} ({', '.join(record['modalities']) or 'no item features'}), seed {record['seed']}")
    print(result_table(record))
    epochs = len(record["epochs"])
    best = "" if record["best_epoch"] is None else f", best epoch {record['best_epoch']} by {record['protocol']['valid_metric']}"
    print(
        f"\n{epochs} epochs{best}, {seconds:.1f} s, peak memory {record['memory']['peak_rss_mb']:.0f} MiB. Everything is in {outcome['run_dir']}"
    )
    return 0


def _without(arguments: Sequence[str], key: str) -> list[str]:
    """The words of the command line without option `key` and its values."""
    kept, skipping = [], False
    for word in arguments:
        if word.startswith("--"):
            skipping = word[2:].partition("=")[0].replace("-", "_") == key
        if not skipping:
            kept.append(word)
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 0, 1 for a bug of ours, 2 for wrong input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if os.environ.get(launch.REPORTS):
        launch.watch_launcher()
    arguments = [word for word in arguments if word != "--debug"]
    try:
        return _dispatch(arguments)
    except UserError as error:
        if debug:
            traceback.print_exc()
        return _say(str(error))
    except SystemExit as stop:  # argparse has said what is wrong, or has printed its help
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        if not launch.under_launcher():
            print("\nrecbole-mm: interrupted; `--resume=<run directory>` continues a training run.", file=sys.stderr)
        return 130
    except URLError as error:
        if debug:
            traceback.print_exc()
        return _say(
            f"Nothing could be downloaded ({error.reason}). RecBole fetches a dataset it knows by name when data_path has no folder of that name: "
            "check --dataset and --data_path, or the network."
        )
    except OSError as error:
        if debug:
            traceback.print_exc()
        where = f" ({error.filename})" if error.filename else ""
        return _say(f"{error.strerror or error}{where}. Check the disk, the path and its permissions.")
    except (MemoryError, RuntimeError) as error:
        if full := out_of_memory(error):
            if debug:
                traceback.print_exc()
            return _say(full)
        distributed = sys.modules.get("recbole_mm.distributed")
        if distributed is None or not distributed.lost_contact(error):
            raise
        where = distributed.reported("run_dir")
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        text = f"another process of this run is gone ({reason or type(error).__name__}); its own message, or the system's, says why."
        return _say(text + (f" Start again with --resume={where}; it goes on from the last checkpoint." if where else ""), launch.LOST)


def _say(text: str, code: int = 2) -> int:
    """Print what is wrong, once: of several processes the launcher does it; under torchrun the first, unless it is not the one to know."""
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    rank = os.environ.get("RANK", "0") if launch.under_launcher() else "0"
    reports = os.environ.get(launch.REPORTS)
    if reports and launch.under_launcher():
        Path(reports, f"error-{rank}").write_text(text, encoding="utf-8")
        return code
    if rank != "0":
        time.sleep(5)  # where all fail for one reason, torchrun ends us meanwhile, and the first process has said it
        text = f"worker {rank}: {text}"
    print(f"\nrecbole-mm: {text}", file=sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> int:
    command, rest = "train", arguments
    if arguments and not arguments[0].startswith("-"):
        command, rest = arguments[0], arguments[1:]
        if command not in COMMANDS:
            raise UserError(f"Unknown command {command!r}.{nearest(command, COMMANDS)} There are {', '.join(COMMANDS)}.")
    if command == "train" and any(word in ("--help", "-h", "help") for word in rest):
        print(help_text())
        return 0
    if command == "train" and rest and rest[0].partition("=")[0] == "--version":
        from recbole_mm import __version__

        print(__version__)
        return 0
    if command == "train" and rest and rest[0].partition("=")[0] == "--list":
        words = rest[0].partition("=")[2:] if "=" in rest[0] else rest[1:2]
        print(list_things(words[-1] if words else ""))
        return 0
    module, _, name = COMMANDS[command][0].partition(":")
    asks_help = any(word in ("--help", "-h") for word in rest)
    if command in launch.COMMANDS and not asks_help:
        nproc, rest = launch.take_nproc(rest)
        if nproc > 1 and not launch.under_launcher():
            return launch.launch(command, rest, nproc)
    elif launch.under_launcher() and not asks_help:
        raise UserError(
            f"`{command}` runs in one process; several work together in {', '.join(launch.COMMANDS)}. "
            "Searches and benchmarks are spread by starting several of them (docs/distribution.md)."
        )
    function = getattr(importlib.import_module(module), name)
    if asks_help and command not in OWN_HELP:
        print((function.__doc__ or COMMANDS[command][1]).strip().replace("``", ""))
        return 0
    return function(rest)


def entry() -> None:
    """Console script."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `recbole-mm --list models | head` ends quietly
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if launch.under_launcher():  # else DistributedDataParallel warns whenever a batch happens to use all parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.exit(main())


if __name__ == "__main__":
    entry()
