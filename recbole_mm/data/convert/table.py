"""Interactions in a CSV or Parquet file, columns named by flags; item table and pictures beside it if there are any."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from recbole_mm.data.convert.core import Row
from recbole_mm.data.convert.interactions import add_filter_arguments, write_interactions
from recbole_mm.data.convert.output import Output, clean, csv_rows, find_pictures, number, token_problem
from recbole_mm.errors import UserError, nearest

SUMMARY = "one table of interactions, its columns named by flags"
TYPES = ("token", "token_seq", "float")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--user", default="user_id", help="column of the user (default user_id)")
    parser.add_argument("--item", default="item_id", help="column of the item (default item_id)")
    parser.add_argument("--rating", help="column of the rating")
    parser.add_argument("--timestamp", help="column of the time, a number that rises")
    parser.add_argument(
        "--keep", nargs="*", default=[], metavar="COLUMN:TYPE", help=f"further columns for .inter; TYPE: {', '.join(TYPES)}"
    )
    parser.add_argument("--separator", default=",", help="between the columns of a CSV file (default a comma; \\t for a tab)")
    parser.add_argument("--items", type=Path, help="CSV or Parquet file with one row per item; all its columns go to .item")
    parser.add_argument("--items-id", default="item_id", help="its column with the item")
    parser.add_argument("--pictures", type=Path, help="folder with <item>.jpg, .png or .webp")
    add_filter_arguments(parser)


def table_rows(path: Path, separator: str, label: str = "", progress: bool = False) -> Iterator[dict[str, str]]:
    """Rows of a CSV or Parquet file as column -> text, in constant memory; a row of another length gives an empty dict."""
    from tqdm import tqdm

    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    if path.suffix.lower() == ".parquet":
        rows = _parquet_rows(path)
    else:
        rows = _csv_dicts(path, separator)
    yield from tqdm(rows, desc=f"{path.name} {label}".strip(), unit=" rows", disable=not progress)


def _csv_dicts(path: Path, separator: str) -> Iterator[dict[str, str]]:
    rows = csv_rows(path, separator)
    names = next(iter(rows), None)
    if not names:
        raise UserError(f"{path}: expected a first line with column names, got an empty file.")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: a column name stands twice in the first line: {', '.join(names)}.")
    for row in rows:
        if row:
            yield dict(zip(names, row)) if len(row) == len(names) else {}


def _parquet_rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow. Install it with: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise UserError(f"{path}: expected a whole Parquet file ({error}).") from None
    for batch in file.iter_batches(batch_size=8192):
        for row in batch.to_pylist():
            yield {
                name: "" if value is None else (str(value.timestamp()) if hasattr(value, "timestamp") else str(value))
                for name, value in row.items()
            }


def parse_keep(specs: list[str]) -> dict[str, str]:
    """``["review:token_seq"]`` -> {"review": "token_seq"}."""
    kept = {}
    for spec in specs:
        name, _, kind = spec.rpartition(":")
        if not name or kind not in TYPES:
            raise UserError(f"--keep: expected COLUMN:TYPE with TYPE one of {', '.join(TYPES)}, got {spec!r}.{nearest(kind, TYPES)}")
        kept[name] = kind
    return kept


def check_columns(path: Path, there: Mapping[str, str], wanted: list[str]) -> None:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; there are {', '.join(there)}.{nearest(missing[0], there)}")


def convert(args: argparse.Namespace, output: Output) -> None:
    separator = {"\\t": "\t", "tab": "\t"}.get(args.separator, args.separator)
    if len(separator) != 1:
        raise UserError(f"--separator: expected one character, got {args.separator!r}.")
    kept = parse_keep(args.keep)
    source = {"rating": args.rating, "timestamp": args.timestamp}
    fields = {name: "float" for name, column in source.items() if column} | kept
    columns = {name: column for name, column in source.items() if column} | {name: name for name in kept}
    first = next((row for row in table_rows(args.src, separator) if row), None)
    if first is None:
        raise UserError(f"{args.src}: expected at least one row below the column names.")
    check_columns(args.src, first, [args.user, args.item, *columns.values()])

    def records(label: str) -> Iterator[Row]:
        for row in table_rows(args.src, separator, label, args.progress):
            if not row:
                yield Row(dropped="a row with another number of columns than the first line")
                continue
            yield Row(row[args.user].strip(), row[args.item].strip(), {name: row[column] for name, column in columns.items()})

    _users, items = write_interactions(output, records, fields, args)
    if args.items:
        write_items(output, args.items, table_rows(args.items, separator), args.items_id, items)
    if args.pictures:
        write_pictures(output, args.pictures, items)


def write_items(output: Output, path: Path, rows: Iterator[dict[str, str]], key: str, items: set[str]) -> None:
    """``.item`` from a table: columns all of whose values are numbers are floats, the others texts."""
    table: dict[str, dict[str, str]] = {}
    read = 0
    for row in rows:
        read += 1
        if not row:
            output.drop("items", "a row with another number of columns than the first line")
            continue
        check_columns(path, row, [key])
        token = row[key].strip()
        if token_problem(token):
            output.drop("items", str(token_problem(token)))
        elif token not in items:
            output.drop("items", "item without interactions")
        elif token in table:
            output.drop("items", "item given twice")
        else:
            table[token] = {name: value for name, value in row.items() if name != key}
    output.counts["item rows"] = read
    names = list(next(iter(table.values()), {}))
    texts = {name for name in names if any(number(row[name]) is None for row in table.values())}
    header = ["item_id:token", *(f"{clean(name).replace(' ', '_')}:{'token_seq' if name in texts else 'float'}" for name in names)]
    with output.table("item", header) as write:
        for token, row in table.items():
            write([token, *(clean(row[name]) if name in texts else str(number(row[name])) for name in names)])
    if missing := len(items) - len(table):
        output.notes.append(f"{missing:,} items have no row in {path.name}")


def write_pictures(output: Output, folder: Path, items: set[str]) -> None:
    """Pictures of a folder whose stem is an item token."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures.")
    found = find_pictures(folder)
    output.counts["picture files"] = len(found)
    if others := len(found.keys() - items):
        output.drop("pictures", "file of no item in the interactions", others)
    if missing := len(items - found.keys()):
        output.notes.append(f"{missing:,} items have no picture")
    output.pictures(folder, {token: found[token] for token in sorted(items & found.keys())})
