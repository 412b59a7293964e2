"""PerPEFT's files: ``<d>_final.txt``, ``<d>_item2id_final.pickle``, ``<d>_texts_final.pickle``, ``<d>_images/<key>.jpg``.

``_final.txt`` holds one "user item" a line, both from 1, in the order of time per user. The item pickle maps, despite its name, number to
key; the text pickle maps key to title. Item tokens become the keys.
"""

import argparse
from pathlib import Path

from recbole_mm.data.convert.interactions import LEAVE_ONE_OUT
from recbole_mm.data.convert.output import IMAGE_SUFFIXES, Output, clean, required, token_problem
from recbole_mm.data.convert.pickles import read_pickle
from recbole_mm.errors import UserError

SUMMARY = "PerPEFT's files: <d>_final.txt, item and text pickles, <d>_images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefix", help="name before _final.txt (default: that of the only such file in --src)")


def convert(args: argparse.Namespace, output: Output) -> None:
    folder = args.src
    found = sorted(p.name.removesuffix("_final.txt") for p in folder.glob("*_final.txt")) if folder.is_dir() else []
    prefix = args.prefix or (found[0] if len(found) == 1 else None)
    if prefix is None:
        raise UserError(f"{folder}: expected one <dataset>_final.txt, found {found or 'none'}. Choose with --prefix.")
    keys = read_keys(required(folder, f"{prefix}_item2id_final.pickle"))
    text_file = folder / f"{prefix}_texts_final.pickle"
    texts = read_pickle(text_file) if text_file.is_file() else {}
    if not isinstance(texts, dict):
        raise UserError(f"{text_file}: expected a dict item key -> text, got {type(texts).__name__}.")
    path = required(folder, f"{prefix}_final.txt")
    place: dict[str, int] = {}
    used: dict[str, None] = {}
    seen: set[tuple[str, str]] = set()
    read = 0
    with output.table("inter", ["user_id:token", "item_id:token", "timestamp:float"]) as write:
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            read += 1
            parts = line.split()
            if len(parts) != 2 or not all(part.isdigit() for part in parts):
                output.drop("interactions", "a line that is not two numbers")
                continue
            user, item = parts[0], keys.get(int(parts[1]))
            if item is None:
                output.drop("interactions", "an item number that the item pickle does not have")
            elif (user, item) in seen:
                output.drop("interactions", "the same user and item again")
            else:
                seen.add((user, item))
                place[user] = place.get(user, -1) + 1
                write([user, item, str(place[user])])
                used[item] = None
    if not used:
        raise UserError(f"{path}: no interaction is left of {read:,} read.")
    output.counts |= {"interactions": read, "items with a number": len(keys), "items with a text": len(texts)}
    output.written["users"], output.written["items"] = len(place), len(used)
    output.settings["eval_args"] = LEAVE_ONE_OUT
    output.notes.append("timestamp is the position in the user's history")
    if unused := len(set(keys.values()) - used.keys()):
        output.drop("items", "item without interactions", unused)
    with output.table("item", ["item_id:token", "title:token_seq"]) as write:
        for item in used:
            write([item, clean(texts.get(item))])
    if without := sum(1 for item in used if not clean(texts.get(item))):
        output.notes.append(f"{without:,} items have no text")
    images = folder / f"{prefix}_images"
    if images.is_dir():
        sources = {item: images / f"{item}{suffix}" for item in used for suffix in IMAGE_SUFFIXES if (images / f"{item}{suffix}").is_file()}
        if missing := len(used) - len(sources):
            output.drop("pictures", "item without a picture file", missing)
        output.pictures(images, sources)


def read_keys(path: Path) -> dict[int, str]:
    """Number -> item key."""
    value = read_pickle(path)
    if not isinstance(value, dict) or not all(isinstance(number, int) for number in value):
        raise UserError(f"{path}: expected a dict number -> item key (as PerPEFT writes it, despite the file's name).")
    keys = {number: str(key) for number, key in value.items()}
    bad = next((key for key in keys.values() if token_problem(key)), None)
    if bad is not None:
        raise UserError(f"{path}: the item key {bad!r} is {token_problem(bad)}.")
    if len(set(keys.values())) < len(keys):
        raise UserError(f"{path}: two numbers have the same item key.")
    return keys
