"""The card of a dataset: what is in its folder, as numbers (for the report) and as Markdown (``card.md``)."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_mm.data.checks import check_interactions
from recbole_mm.data.convert.atomic import read_header
from recbole_mm.data.convert.output import find_pictures
from recbole_mm.errors import UserError
from recbole_mm.files import derived_folder, write_text

CHUNK = 500_000
PICTURES_OPENED = 500  # sizes are those of so many, evenly spread
QUANTILES = {"min": 0.0, "quarter": 0.25, "median": 0.5, "three quarters": 0.75, "max": 1.0}


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean and quantiles, for the report's plots too."""
    values = np.asarray(values, float)
    if not len(values):
        return {}
    return {"mean": float(values.mean()), **{name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}}


def describe(folder: str | Path, name: str | None = None) -> dict[str, Any]:
    """Users, items, interactions, density, spread, cold items, texts, pictures and features of the dataset in `folder`, called `name` or like it."""
    folder = Path(folder)
    name = name or folder.name
    parts = {part: folder / f"{name}.{part}.inter" for part in ("train", "valid", "test")}
    whole = folder / f"{name}.inter"
    if whole.is_file():
        files = {"all": whole}
    else:
        files = {part: path for part, path in parts.items() if path.is_file()}
    if not files:
        raise UserError(f"{folder}: expected {name}.inter or {name}.train.inter and so on; nothing to describe.")
    data = {part: _read_inter(path) for part, path in files.items()}
    user = np.concatenate([d["user"] for d in data.values()])
    item = np.concatenate([d["item"] for d in data.values()])
    users, user = np.unique(user, return_inverse=True)
    items, item = np.unique(item, return_inverse=True)
    card: dict[str, Any] = {
        "name": name,
        "users": len(users),
        "items": len(items),
        "interactions": len(user),
        "density": len(user) / (len(users) * len(items)) if len(user) else 0.0,
        "per_user": spread(np.bincount(user)),
        "per_item": spread(np.bincount(item)),
        "parts": {part: len(d["user"]) for part, d in data.items()} if len(data) > 1 else {},
    }
    times = (
        np.concatenate([d["time"] for d in data.values() if d["time"] is not None])
        if all(d["time"] is not None for d in data.values())
        else None
    )
    if times is not None and len(times):
        card["time"] = {"first": float(times.min()), "last": float(times.max())}
    card |= _cold(data, user, item, len(items), times)
    tokens = _item_tokens(files.values())
    card["texts"] = _texts(folder / f"{name}.item", tokens)
    card["pictures"] = _pictures(folder / "images", tokens)
    card["features"] = _features(folder, tokens)
    return card


def _read_inter(path: Path) -> dict[str, np.ndarray | None]:
    """Hashes of user and item, and times: 24 bytes a row, whatever the tokens."""
    fields = read_header(path)
    check_interactions(path, "user_id", "item_id")
    timed = "timestamp" in fields
    columns = ["user_id", "item_id"] + (["timestamp"] if timed else [])
    out: dict[str, list] = {"user": [], "item": [], "time": []}
    try:
        for chunk in pd.read_csv(
            path, sep="\t", usecols=[f"{c}:{fields[c]}" for c in columns], dtype=str, keep_default_na=False, chunksize=CHUNK
        ):
            out["user"].append(pd.util.hash_array(chunk[f"user_id:{fields['user_id']}"].to_numpy(object)))
            out["item"].append(pd.util.hash_array(chunk[f"item_id:{fields['item_id']}"].to_numpy(object)))
            if timed:
                out["time"].append(pd.to_numeric(chunk[f"timestamp:{fields['timestamp']}"], errors="coerce").to_numpy())
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected UTF-8 text with columns separated by tabs ({error}).") from None

    def join(parts: list[np.ndarray], kind: type) -> np.ndarray:
        return np.concatenate(parts) if parts else np.empty(0, kind)

    return {"user": join(out["user"], np.uint64), "item": join(out["item"], np.uint64), "time": join(out["time"], float) if timed else None}


def _cold(data: dict, user: np.ndarray, item: np.ndarray, n_items: int, times: np.ndarray | None) -> dict[str, Any]:
    """Items without an interaction in training: of the ready split, else of leave-one-out by time."""
    if "train" in data:
        sizes = [len(d["user"]) for d in data.values()]
        train = np.concatenate([np.full(size, part == "train") for part, size in zip(data, sizes)])
        test = np.concatenate([np.full(size, part == "test") for part, size in zip(data, sizes)])
        split = "the ready split"
    elif times is not None:
        order = np.lexsort((times, user))
        sizes = np.bincount(user)
        from_end = np.repeat(np.cumsum(sizes), sizes) - 1 - np.arange(len(user))
        train, test = np.empty(len(user), bool), np.empty(len(user), bool)
        train[order], test[order] = from_end >= 2, from_end == 0
        split = "leave-one-out by time"
    else:
        return {"cold": None}
    warm = np.bincount(item[train], minlength=n_items) > 0
    share = float((~warm[item[test]]).mean()) if test.any() else 0.0
    return {"cold": {"split": split, "items": int((~warm).sum()), "test_share": share}}


def _item_tokens(files) -> set[str]:
    tokens: set[str] = set()
    for path in files:
        column = f"item_id:{read_header(path)['item_id']}"
        for chunk in pd.read_csv(path, sep="\t", usecols=[column], dtype=str, keep_default_na=False, chunksize=CHUNK):
            tokens.update(chunk[column].unique())
    return tokens


def _texts(path: Path, tokens: set[str]) -> dict[str, dict]:
    """Per text field: how many of the items have it, and its length in words."""
    if not path.is_file():
        return {}
    fields = read_header(path)
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    table.columns = list(fields)
    if "item_id" not in table:
        return {}
    table = table[table["item_id"].isin(tokens)]
    result = {}
    for name, kind in fields.items():
        if name == "item_id" or not kind.startswith("token"):
            continue
        words = table[name].str.split().str.len().to_numpy()
        result[name] = {"items": int((words > 0).sum()), "words": spread(words[words > 0])}
    return result


def _pictures(folder: Path, tokens: set[str]) -> dict[str, Any]:
    if not folder.is_dir():
        return {}
    from PIL import Image

    found = find_pictures(folder)
    mine = sorted(found.keys() & tokens)
    sizes, broken = [], 0
    for token in mine[:: max(1, len(mine) // PICTURES_OPENED)]:
        try:
            with Image.open(found[token]) as picture:  # reads the header only
                sizes.append(picture.size)
        except Exception:
            broken += 1
    sides = np.array(sizes).reshape(-1, 2)
    return {
        "items": len(mine),
        "of_no_item": len(found) - len(mine),
        "opened": len(sizes) + broken,
        "broken": broken,
        "width": spread(sides[:, 0]),
        "height": spread(sides[:, 1]),
        "bytes": sum(found[token].stat().st_size for token in mine),
    }


def _features(folder: Path, tokens: set[str]) -> dict[str, dict]:
    """Feature set -> modality -> columns, type and items with a row."""
    from recbole_mm.data.features import feature_files, open_table, read_ids

    sets = {}
    for place in [folder, *sorted((folder / "features").glob("*/"))]:
        files = feature_files(place)
        if not files:
            continue
        ids = read_ids(place)
        described = {}
        for modality, path in files.items():
            table = open_table(path)
            rows = len(tokens & set(ids)) if ids is not None else sum(1 for t in tokens if t.isdigit() and int(t) < len(table))
            described[modality] = {"columns": int(table.shape[1]), "type": str(table.dtype), "items": rows}
        sets["(dataset folder)" if place == folder else place.name] = described
    return sets


def _cell(text: object) -> str:
    """Names in a dataset are foreign text: nothing in them may act as Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#&!])", r"\\\1", str(text)).replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def card_text(card: dict[str, Any]) -> str:
    """The card as Markdown."""

    def share(n: int) -> str:
        return f"{n:,} ({n / max(1, card['items']):.1%})"

    lines = [
        f"# {_cell(card['name'])}",
        "",
        "| | |",
        "|---|---|",
        f"| users | {card['users']:,} |",
        f"| items | {card['items']:,} |",
        f"| interactions | {card['interactions']:,} |",
        f"| density | {card['density']:.4%} |",
    ]
    lines += [f"| in {part} | {n:,} |" for part, n in card["parts"].items()]
    if card.get("time"):
        lines.append(f"| time | {card['time']['first']:.0f} to {card['time']['last']:.0f} |")
    if card["cold"]:
        cold = card["cold"]
        lines.append(f"| items without training interaction ({cold['split']}) | {share(cold['items'])} |")
        lines.append(f"| test interactions with such an item | {cold['test_share']:.1%} |")
    rows = {"interactions per user": card["per_user"], "interactions per item": card["per_item"]}
    rows |= {f"words in {_cell(name)}": text["words"] for name, text in card["texts"].items()}
    if card["pictures"]:
        rows |= {"picture width": card["pictures"]["width"], "picture height": card["pictures"]["height"]}
    lines += ["", "| | mean | " + " | ".join(QUANTILES) + " |", "|---|" + "---|" * (len(QUANTILES) + 1)]
    for name, values in rows.items():
        if values:
            lines.append(f"| {name} | {values['mean']:.1f} | " + " | ".join(f"{values[q]:g}" for q in QUANTILES) + " |")
    lines += ["", "| content | items that have it |", "|---|---|"]
    lines += [f"| {_cell(name)} | {share(text['items'])} |" for name, text in card["texts"].items()]
    if pictures := card["pictures"]:
        note = f", {pictures['broken']} of {pictures['opened']} opened are broken" if pictures["broken"] else ""
        lines.append(f"| pictures ({pictures['bytes'] / 1e6:.1f} MB{note}) | {share(pictures['items'])} |")
    for name, modalities in card["features"].items():
        for modality, about in modalities.items():
            lines.append(f"| features {_cell(name)}, {_cell(modality)}: {about['columns']} x {about['type']} | {share(about['items'])} |")
    return "\n".join(lines) + "\n"


def write_card(folder: str | Path, name: str | None = None) -> str:
    """Write ``card.md`` into the dataset's folder and return its text."""
    text = card_text(describe(folder, name))
    write_text(Path(folder) / "card.md", text)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """``recbole-mm describe``: write ``card.md`` and print it."""
    from recbole_mm.paths import bundled_dataset_dir

    parser = argparse.ArgumentParser(
        prog="recbole-mm describe", description="Write the card of a dataset and print it.", allow_abbrev=False
    )
    parser.add_argument("--dataset", default="shop", help="name of the dataset (default shop)")
    parser.add_argument(
        "--data_path", type=Path, help="the folder that holds the dataset's folder (default dataset/, then the bundled samples)"
    )
    args = parser.parse_args(arguments)
    roots = [args.data_path] if args.data_path else [Path("dataset"), bundled_dataset_dir()]
    folder = next((root / args.dataset for root in roots if (root / args.dataset).is_dir()), None)
    if Path(args.dataset).name != args.dataset or folder is None:
        raise UserError(f"Unknown dataset {args.dataset!r}: no folder {' or '.join(str(root / args.dataset) for root in roots)}.")
    text = card_text(describe(folder))
    path = derived_folder(folder) / "card.md"  # a read-only folder stays as it is, also for root
    write_text(path, text)
    print(f"{text}\nWritten to {path}")
    return 0
