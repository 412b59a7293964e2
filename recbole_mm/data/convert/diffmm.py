"""The folder of MMSSL and DiffMM: sparse matrices ``trnMat.pkl``, ``valMat.pkl``, ``tstMat.pkl`` and feature files with row r = item r."""

import argparse
from pathlib import Path

import numpy as np

from recbole_mm.data.convert.interactions import PARTS
from recbole_mm.data.convert.mmrec import features
from recbole_mm.data.convert.output import Output, required
from recbole_mm.data.convert.pickles import read_pickle
from recbole_mm.errors import UserError

SUMMARY = "MMSSL's and DiffMM's folder: trnMat.pkl, valMat.pkl, tstMat.pkl, *_feat.npy"
FILES = {"train": ("trnMat.pkl", "train_mat.pkl"), "valid": ("valMat.pkl", "val_mat.pkl"), "test": ("tstMat.pkl", "test_mat.pkl")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags of its own."""


def matrix(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Rows, columns of the entries other than 0, and the shape."""
    from scipy import sparse

    value = read_pickle(path)
    if not sparse.issparse(value):
        raise UserError(f"{path}: expected a scipy sparse matrix users x items, got {type(value).__name__}.")
    try:
        value = value.tocoo()
        rows, columns = np.asarray(value.row, np.int64), np.asarray(value.col, np.int64)
        inside = (rows >= 0).all() and (columns >= 0).all() and (rows < value.shape[0]).all() and (columns < value.shape[1]).all()
        if not len(rows) == len(columns) == len(value.data) or not inside:
            raise ValueError("indices outside its shape")
        there = np.asarray(value.data) != 0
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: the sparse matrix is damaged ({error}).") from None
    return rows[there], columns[there], value.shape


def convert(args: argparse.Namespace, output: Output) -> None:
    if not args.src.is_dir():
        raise UserError(f"{args.src}: expected a folder with {', '.join(names[0] for names in FILES.values())}.")
    parts = {part: matrix(required(args.src, *FILES[part])) for part in PARTS}
    shapes = {part: shape for part, (_, _, shape) in parts.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{args.src}: the three matrices differ in shape: {shapes}.")
    n_items = shapes["train"][1]
    seen = np.empty(0, np.int64)
    items: set[str] = set()
    users: set[str] = set()
    for part, (rows, columns, _) in parts.items():
        keys, first = np.unique(rows * n_items + columns, return_index=True)
        fresh = first[~np.isin(keys, seen)]
        if repeated := len(rows) - len(fresh):
            output.drop("interactions", f"{part}: the same user and item again", repeated)
        seen = np.union1d(seen, keys)
        with output.table(f"{part}.inter", ["user_id:token", "item_id:token"]) as write:
            for place in np.sort(fresh):
                user, item = str(rows[place]), str(columns[place])
                write([user, item])
                users.add(user)
                items.add(item)
    if not items:
        raise UserError(f"{args.src}: the matrices hold no interaction.")
    output.counts["interactions"] = sum(len(rows) for rows, _, _ in parts.values())
    output.written["users"], output.written["items"] = len(users), len(items)
    output.settings |= {"benchmark_filename": list(PARTS), "load_col": {"inter": ["user_id", "item_id"]}, "negative_items": "train"}
    features(args.src, output, items)
