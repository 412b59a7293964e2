"""MMRec's folder: ``<name>.inter`` (``userID, itemID, ..., x_label`` 0 train, 1 valid, 2 test), ``image_feat.npy``, ``text_feat.npy``.

Row r of a feature file is item r. ``i_id_mapping.csv`` (original key, number), where it is there, gives ``.item`` the original keys.
"""

import argparse
from pathlib import Path

from recbole_mm.data.convert.interactions import PARTS
from recbole_mm.data.convert.output import Output, clean, csv_rows, load_rows, number, token_problem
from recbole_mm.errors import UserError

SUMMARY = "MMRec's folder: .inter with x_label, image_feat.npy, text_feat.npy"
FEATURES = {"text_feat.npy": "textual", "image_feat.npy": "visual", "audio_feat.npy": "acoustic"}
KNOWN = {"rating": "float", "timestamp": "float"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=Path, help="folder with <itemID>.jpg, .png or .webp")


def convert(args: argparse.Namespace, output: Output) -> None:
    folder = args.src
    tables = sorted(folder.glob("*.inter")) if folder.is_dir() else []
    if len(tables) != 1:
        raise UserError(f"{folder}: expected a folder with one .inter file, found {[p.name for p in tables] or 'none'}.")
    items = _interactions(tables[0], output)
    features(folder, output, items)
    mapping = folder / "i_id_mapping.csv"
    if mapping.is_file():
        _raw_keys(mapping, output, items)
    if args.pictures:
        from recbole_mm.data.convert.table import write_pictures

        write_pictures(output, args.pictures, items)


def _interactions(path: Path, output: Output) -> set[str]:
    rows = csv_rows(path)
    header = [name.split(":")[0] for name in next(iter(rows), [])]
    places = {name: place for place, name in enumerate(header)}
    if missing := [name for name in ("userID", "itemID", "x_label") if name not in places]:
        raise UserError(
            f"{path}: expected the columns userID, itemID and x_label separated by tabs; {', '.join(missing)} missing in {header}."
        )
    floats = [name for name in KNOWN if name in places]
    fields = ["user_id:token", "item_id:token", *(f"{name}:float" for name in floats)]
    seen: set[tuple[str, str]] = set()
    items: set[str] = set()
    users: set[str] = set()
    read = 0
    from contextlib import ExitStack

    with ExitStack() as stack:
        writers = [stack.enter_context(output.table(f"{part}.inter", fields)) for part in PARTS]
        for row in rows:
            read += 1
            if len(row) != len(header):
                output.drop("interactions", "a row with another number of columns than the first line")
                continue
            user, item, label = (row[places[name]].strip() for name in ("userID", "itemID", "x_label"))
            numbers = [number(row[places[name]]) for name in floats]
            if problem := token_problem(user) or token_problem(item):
                output.drop("interactions", problem)
            elif label not in ("0", "1", "2"):
                output.drop("interactions", "x_label is not 0, 1 or 2")
            elif None in numbers:
                output.drop("interactions", "rating or timestamp is no number")
            elif (user, item) in seen:
                output.drop("interactions", "the same user and item again")
            else:
                seen.add((user, item))
                writers[int(label)]([user, item, *numbers])
                users.add(user)
                items.add(item)
    if not seen:
        raise UserError(f"{path}: no interaction is left of {read:,} read.")
    output.counts["interactions"] = read
    output.written["users"], output.written["items"] = len(users), len(items)
    output.settings["benchmark_filename"] = list(PARTS)
    output.settings["negative_items"] = "train"
    return items


def features(folder: Path, output: Output, items: set[str], name: str = "published") -> None:
    """Feature files whose row r is item r; items beyond the last row are counted."""
    tables = {modality: load_rows(folder / file) for file, modality in FEATURES.items() if (folder / file).is_file()}
    if not tables:
        output.notes.append("no feature files; extract features or add them under features/")
        return
    lengths = {modality: len(table) for modality, table in tables.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{folder}: the feature files differ in rows ({lengths}); row r must be item r in each.")
    rows = next(iter(lengths.values()))
    without = sum(1 for item in items if not (item.isdigit() and int(item) < rows))
    if without:
        output.notes.append(f"{without:,} items have no feature row (missing_modality decides what a run does)")
    output.features(name, tables, [str(row) for row in range(rows)], {"encoder": None})


def _raw_keys(path: Path, output: Output, items: set[str]) -> None:
    rows = csv_rows(path)
    next(iter(rows), None)
    with output.table("item", ["item_id:token", "raw_id:token"]) as write:
        for row in rows:
            if len(row) == 2 and row[1] in items and not token_problem(clean(row[0])):
                write([row[1], clean(row[0])])
            else:
                output.drop("items", "mapping of no item in the interactions")
