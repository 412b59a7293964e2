"""RecBole's own atomic files, checked line by line, with a folder of pictures or feature files beside them."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from recbole_mm.data.convert.core import Row
from recbole_mm.data.convert.interactions import add_filter_arguments, write_interactions
from recbole_mm.data.convert.output import Output, clean, number, token_problem
from recbole_mm.data.convert.table import write_pictures
from recbole_mm.errors import UserError

SUMMARY = "RecBole's atomic files (.inter, .item, .user) and a folder of pictures"
TYPES = ("token", "token_seq", "float", "float_seq")
USERS, ITEMS = ("user_id", "item_id")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="name of the atomic files in --src (default: the folder's, else that of the only .inter file)")
    parser.add_argument("--pictures", type=Path, help="folder with <item>.jpg, .png or .webp")
    parser.add_argument("--user-field", default=USERS)
    parser.add_argument("--item-field", default=ITEMS)
    add_filter_arguments(parser)


def read_header(path: Path) -> dict[str, str]:
    """Field -> type of an atomic file."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            columns = stream.readline().rstrip("\r\n").split("\t")
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected UTF-8 text.") from None
    fields = {}
    for column in columns:
        name, _, kind = column.rpartition(":")
        if not name or kind not in TYPES:
            raise UserError(
                f"{path}: expected a first line of fields name:type separated by tabs, with types {', '.join(TYPES)}; got {column!r}. "
                "For a table without types use: recbole-mm convert csv"
            )
        fields[name] = kind
    return fields


def read_lines(path: Path, width: int) -> Iterator[list[str] | None]:
    """Values of each line below the first; None for a line of another width."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as stream:
            next(stream, None)
            for line in stream:
                if line.strip():
                    values = line.rstrip("\r\n").split("\t")
                    yield values if len(values) == width else None
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected UTF-8 text.") from None


def convert(args: argparse.Namespace, output: Output) -> None:
    folder = args.src
    found = sorted(p.stem for p in folder.glob("*.inter")) if folder.is_dir() else []
    name = args.name or (folder.name if folder.name in found else found[0] if len(found) == 1 else None)
    if name is None or name not in found:
        raise UserError(f"{folder}: expected one .inter file, found {', '.join(found) or 'none'}. Choose with --name.")
    path = folder / f"{name}.inter"
    fields = read_header(path)
    for field in (args.user_field, args.item_field):
        if field not in fields:
            raise UserError(f"{path}: no field {field!r}; there are {', '.join(fields)}. Set --user-field and --item-field.")
    names = list(fields)
    rest = {field: kind for field, kind in fields.items() if field not in (args.user_field, args.item_field)}
    user, item = names.index(args.user_field), names.index(args.item_field)
    if "timestamp" not in rest and args.split == "loo":
        args.split = "none"
        output.notes.append("no timestamp: the split is left to eval_args")

    def records(label: str) -> Iterator[Row]:
        for values in read_lines(path, len(fields)):
            if values is None:
                yield Row(dropped="a line with another number of fields than the first")
            else:
                yield Row(values[user].strip(), values[item].strip(), dict(zip(names, values)))

    users, items = write_interactions(output, records, rest, args)
    for suffix, key, field, known in (("item", "items", args.item_field, items), ("user", "users", args.user_field, users)):
        if (folder / f"{name}.{suffix}").is_file():
            _side_table(folder / f"{name}.{suffix}", suffix, key, field, known, output)
    if args.pictures:
        write_pictures(output, args.pictures, items)


def _side_table(path: Path, suffix: str, kind: str, key: str, known: set[str], output: Output) -> None:
    fields = read_header(path)
    if key not in fields:
        raise UserError(f"{path}: no field {key!r}; there are {', '.join(fields)}.")
    place, floats = list(fields).index(key), [place for place, kind_ in enumerate(fields.values()) if kind_ == "float"]
    rename = {"item": ITEMS, "user": USERS}[suffix]
    written: set[str] = set()
    read = 0
    with output.table(suffix, [f"{rename if name == key else name}:{type_}" for name, type_ in fields.items()]) as write:
        for values in read_lines(path, len(fields)):
            read += 1
            if values is None:
                output.drop(kind, "a line with another number of fields than the first")
                continue
            token = values[place].strip()
            if token_problem(token):
                output.drop(kind, str(token_problem(token)))
            elif token not in known:
                output.drop(kind, f"{kind[:-1]} without interactions")
            elif token in written:
                output.drop(kind, f"{kind[:-1]} given twice")
            elif any(values[p] and number(values[p]) is None for p in floats):
                output.drop(kind, "a float field that is no number")
            else:
                written.add(token)
                write([clean(value) for value in values])
    output.counts[f"{suffix} lines"] = read
