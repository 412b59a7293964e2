"""Bring data of other formats into RecBole's atomic files, feature sets and pictures."""

import argparse
import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from recbole_mm.errors import UserError, nearest

#: format -> module of this package; each has SUMMARY, add_arguments(parser) and convert(args, output)
FORMATS = {
    "mmrec": "mmrec",
    "amazon": "amazon",
    "vip5": "vip5",
    "perpeft": "perpeft",
    "diffmm": "diffmm",
    "csv": "table",
    "parquet": "table",
    "recbole": "atomic",
}
#: what works on a dataset that is there
ACTIONS = {"pictures": "fetch the pictures that images.csv of a dataset lists"}


def load_format(name: str):
    """The module of a format."""
    return importlib.import_module(f"{__name__}.{FORMATS[name]}")


def usage() -> str:
    lines = ["usage: recbole-mm convert <format> --src ... --out dataset/<name> [--help]", "", "formats:"]
    lines += [f"  {name:<10} {load_format(name).SUMMARY}" for name in FORMATS]
    lines += ["", "with a dataset that is there:"]
    lines += [f"  {name:<10} recbole-mm convert {name} --src dataset/<name>: {text}" for name, text in ACTIONS.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """``recbole-mm convert``."""
    arguments = list(arguments or ())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name in ACTIONS:
        return _pictures(rest)
    if name not in FORMATS:
        known = [*FORMATS, *ACTIONS]
        raise UserError(f"Unknown format {name!r}.{nearest(name, known)} There are {', '.join(known)}.")
    module = load_format(name)
    parser = argparse.ArgumentParser(prog=f"recbole-mm convert {name}", description=module.__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--src", type=Path, required=True, help="the source: a folder, or the file of interactions")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new dataset, e.g. dataset/toys; its name is the dataset's")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    if not args.src.exists():
        raise UserError(f"--src: there is no {args.src}.")

    from recbole_mm.data.convert.output import Output

    with Output(args.out, args.overwrite, shlex.join(["recbole-mm", "convert", *arguments])) as output:
        module.convert(args, output)
    print(output.report())
    if getattr(args, "download", False):
        return _pictures(["--src", str(args.out), "--rate", str(args.rate)] + ([] if args.progress else ["--no-progress"]))
    print(f"\nCard: {args.out / 'card.md'}. Use it: recbole-mm --dataset={args.out.name} --data_path={args.out.parent}")
    return 0


def _pictures(arguments: Sequence[str]) -> int:
    from recbole_mm.data.card import write_card
    from recbole_mm.data.convert.download import Politeness, fetch_pictures

    parser = argparse.ArgumentParser(prog="recbole-mm convert pictures", description=ACTIONS["pictures"])
    parser.add_argument("--src", type=Path, required=True, help="the dataset's folder, with images.csv")
    parser.add_argument("--rate", type=float, default=Politeness.rate, help="pictures a second, at the most")
    parser.add_argument("--retries", type=int, default=Politeness.retries)
    parser.add_argument("--retry-failed", action="store_true", help="ask again for those given up before")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    args = parser.parse_args(arguments)
    result = fetch_pictures(args.src, Politeness(rate=args.rate, retries=args.retries), args.retry_failed, args.progress)
    print("pictures: " + (", ".join(f"{n:,} {how}" for how, n in result.items()) or "none listed"))
    write_card(args.src)
    return 0
