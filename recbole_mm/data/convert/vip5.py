"""VIP5's official data folder: sequences, id maps, explanations, user names, metadata and one feature file per item.

Read: ``sequential_data.txt`` (user, then items in time order), ``datamaps.json``, ``exp_splits.pkl`` and ``review_splits.pkl``,
``user_id2name.pkl``, ``meta.json.gz``, ``item2img_dict.pkl``, ``<FEAT>_features/<split>/<key>.npy``. Tokens are the official numbers as text;
the original keys stand in ``raw_id``. The numbers follow the order of appearance, test items included, so a model that reads them as text
sees the answer: models here number items anew unless told otherwise.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from recbole_mm.data.convert.amazon import item_values, lines, parse
from recbole_mm.data.convert.interactions import LEAVE_ONE_OUT
from recbole_mm.data.convert.output import IMAGE_SUFFIXES, Output, clean, number, read_json, required, token_problem
from recbole_mm.data.convert.pickles import read_pickle
from recbole_mm.errors import UserError

SUMMARY = "VIP5's data folder: sequential_data.txt, datamaps.json, *_splits.pkl, features"
FIELDS = [
    "user_id:token", "item_id:token", "timestamp:float", "rating:float", "feature_word:token", "summary:token_seq", "review:token_seq",
    "review_split:token",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", type=Path, help="folder with <key>.npy, one vector per item, e.g. features/vitb32_features/toys")
    parser.add_argument("--feature-name", default="vip5", help="name of the feature set that is written (default vip5)")
    parser.add_argument("--pictures", type=Path, help="folder with the pictures, named by item key or as item2img_dict.pkl says")


def convert(args: argparse.Namespace, output: Output) -> None:
    folder = args.src
    if not folder.is_dir():
        raise UserError(f"{folder}: expected VIP5's data folder of one split, e.g. data/toys.")
    maps = read_json(required(folder, "datamaps.json"))
    try:
        raw_of = {str(n): str(key) for n, key in maps["id2item"].items()}
        item_number = {str(key): str(n) for key, n in maps["item2id"].items()}
        user_number = {str(key): str(n) for key, n in maps["user2id"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / 'datamaps.json'}: expected the maps user2id, item2id and id2item.") from None
    reviews = _reviews(folder, output, user_number, item_number)
    users, items = _interactions(required(folder, "sequential_data.txt"), output, raw_of, reviews)
    _users(folder, output, users)
    _items(folder, output, items, raw_of, args.progress)
    if args.features:
        _features(args.features, args.feature_name, output, items, raw_of)
    if args.pictures:
        _pictures(folder, args.pictures, output, items, raw_of)


def _splits(path: Path) -> Iterator[tuple[str, dict]]:
    value = read_pickle(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a dict train/val/test -> list of records, got {type(value).__name__}.")
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        for record in value.get(split) or []:
            yield name, record


def _reviews(folder: Path, output: Output, user_number: dict, item_number: dict) -> dict[tuple[str, str], list[str]]:
    """(user, item) -> rating, feature word, headline, explanation, split; ratings of reviews without an explanation are taken too."""
    found: dict[tuple[str, str], list[str]] = {}
    read = 0
    for file, explained in (("exp_splits.pkl", True), ("review_splits.pkl", False)):
        if not (folder / file).is_file():
            output.notes.append(f"no {file}")
            continue
        for split, record in _splits(folder / file):
            read += explained
            if not isinstance(record, dict) or record.get("reviewerID") not in user_number or record.get("asin") not in item_number:
                output.drop("reviews", f"{file}: no record of a known user and item")
                continue
            pair = user_number[record["reviewerID"]], item_number[record["asin"]]
            if pair in found:
                if explained:
                    output.drop("reviews", f"{file}: the same user and item again")
                continue
            word = clean(record.get("feature")) if explained else ""
            text = clean(record.get("explanation")) if explained else ""
            rating = number(record.get("overall")) or ""
            found[pair] = [rating, word, clean(record.get("summary")), text, split if explained else ""]
    output.counts["explanations"] = read
    return found


def _interactions(path: Path, output: Output, raw_of: dict, reviews: dict) -> tuple[set[str], set[str]]:
    users: set[str] = set()
    items: set[str] = set()
    read = 0
    waiting = set(reviews)
    ready: list[list[str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        user, *sequence = line.split() or [""]
        read += len(sequence)
        if not user:
            continue
        if user in users or token_problem(user):
            output.drop("interactions", "a second line of the same user" if user in users else str(token_problem(user)), len(sequence))
            continue
        bought: set[str] = set()
        for item in sequence:
            if item not in raw_of:
                output.drop("interactions", "an item that datamaps.json does not have")
            elif item in bought:
                output.drop("interactions", "the same user and item again")
            else:
                waiting.discard((user, item))
                ready.append([user, item, str(len(bought)), *reviews.get((user, item), [""] * 5)])
                bought.add(item)
        if bought:
            users.add(user)
            items |= bought
    if not ready:
        raise UserError(f"{path}: no interaction is left of {read:,} read.")
    complete = all(row[3] for row in ready)
    fields = [field for field in FIELDS if reviews or field in FIELDS[:3]]
    if reviews and not complete:
        output.notes.append("some interactions have no rating; the rating column is left out")
        fields.remove("rating:float")
    with output.table("inter", fields) as write:
        places = [FIELDS.index(field) for field in fields]
        for row in ready:
            write([row[place] for place in places])
    if waiting:
        output.drop("reviews", "review of a pair that is not in sequential_data.txt", len(waiting))
    output.counts["interactions"] = read
    output.written |= {"users": len(users), "items": len(items), "explanations": sum(1 for row in ready if row[6])}
    slim = ["user_id", "item_id", "timestamp"] + (["rating"] if reviews and complete else [])
    output.settings |= {"eval_args": LEAVE_ONE_OUT, "load_col": {"inter": slim}}
    output.notes.append("timestamp is the position in the user's history")
    return users, items


def _users(folder: Path, output: Output, users: set[str]) -> None:
    path = folder / "user_id2name.pkl"
    if not path.is_file():
        output.notes.append("no user_id2name.pkl: users have no names")
        return
    names = read_pickle(path)
    if not isinstance(names, dict):
        raise UserError(f"{path}: expected a dict user number -> name, got {type(names).__name__}.")
    with output.table("user", ["user_id:token", "name:token_seq"]) as write:
        for user, name in names.items():
            if str(user) in users:
                write([str(user), clean(name)])
            else:
                output.drop("users", "a name of no user in the sequences")


def _items(folder: Path, output: Output, items: set[str], raw_of: dict, progress: bool) -> None:
    values: dict[str, list[str]] = {}
    wanted = {raw_of[item]: item for item in items}
    path = folder / "meta.json.gz"
    if path.is_file():
        for line in lines(path, "", progress):
            record = parse(line) if line.strip() else None
            if record is None:
                output.drop("items", "a line of meta.json.gz that is neither JSON nor a Python literal")
            elif (item := wanted.get(str(record.get("asin")))) is None:
                output.drop("items", "metadata of an item without interactions")
            else:
                values.setdefault(item, item_values(record))
    else:
        output.notes.append("no meta.json.gz: items have no texts")
    header = [
        "item_id:token",
        "raw_id:token",
        "title:token_seq",
        "description:token_seq",
        "brand:token_seq",
        "categories:token_seq",
        "price:token",
    ]
    with output.table("item", header) as write:
        for item in sorted(items, key=lambda token: (len(token), token)):
            write([item, clean(raw_of[item]), *values.get(item, [""] * 5)])


def _features(folder: Path, name: str, output: Output, items: set[str], raw_of: dict) -> None:
    if not folder.is_dir():
        raise UserError(f"--features: expected a folder with one .npy per item, {folder} is none.")
    ids: list[str] = []
    rows: list[np.ndarray] = []
    for item in sorted(items, key=lambda token: (len(token), token)):
        key = raw_of[item]
        path = folder / f"{key}.npy"
        if Path(key).name != key or not path.is_file():
            output.drop("features", "item without a feature file")
            continue
        try:
            row = np.load(path, allow_pickle=False).reshape(-1)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: expected a .npy file with one vector ({error}).") from None
        if rows and len(row) != len(rows[0]):
            raise UserError(f"{path}: expected {len(rows[0])} numbers as in the files before, got {len(row)}.")
        ids.append(item)
        rows.append(row.astype(np.float32))
    if not rows:
        raise UserError(f"{folder}: no feature file of any item; expected names such as {raw_of[next(iter(items))]}.npy.")
    output.features(name, {"visual": np.stack(rows)}, ids, {"encoder": None})


def _pictures(folder: Path, pictures: Path, output: Output, items: set[str], raw_of: dict) -> None:
    if not pictures.is_dir():
        raise UserError(f"--pictures: expected a folder, {pictures} is none.")
    named: dict = {}
    if (folder / "item2img_dict.pkl").is_file():
        value = read_pickle(folder / "item2img_dict.pkl")
        named = value if isinstance(value, dict) else {}
    sources = {}
    for item in sorted(items):
        key = raw_of[item]
        candidates = [pictures / f"{key}{suffix}" for suffix in IMAGE_SUFFIXES]
        if isinstance(name := named.get(key), str):
            candidates.insert(0, pictures / Path(name).name)
        sources[item] = next((path for path in candidates if path.is_file()), candidates[0])
    output.pictures(pictures, sources)
