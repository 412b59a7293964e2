"""Feature files: find them, load them memory-mapped, align their rows to RecBole's item ids, check them, write them.

A feature set is a folder with ``<modality>.npy`` (one row per item), ``item_ids.txt`` (the token of each row) and, where we made it,
``meta.json``. MMRec's names ``image_feat.npy`` and ``text_feat.npy`` are understood as visual and textual.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from recbole_mm.errors import UserError, nearest
from recbole_mm.files import atomic_path, derived_folder, write_json, write_text

STANDARD = ("textual", "visual", "acoustic")
ALIASES = {"image_feat": "visual", "text_feat": "textual"}  # MMRec
IDS_FILE, META_FILE = "item_ids.txt", "meta.json"
MISSING = ("error", "zero", "mean")
_CHUNK_BYTES = 64 << 20


def feature_files(folder: Path) -> dict[str, Path]:
    """Modality -> file of the feature set in `folder`, standard modalities first; empty where there is none.

    Raises:
        UserError: when two files claim to be the same modality.
    """
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("*.npy")):
        name = ALIASES.get(path.stem, path.stem)
        if path.name.startswith("."):
            continue  # a file that is being written
        if name in found:
            raise UserError(f"{folder}: {found[name].name} and {path.name} both hold {name} features. Remove one.")
        found[name] = path
    order = [name for name in STANDARD if name in found] + [name for name in found if name not in STANDARD]
    return {name: found[name] for name in order}


def set_name(config) -> str | None:
    """Name of the run's feature set: ``feature_set``, else the encoder's (``<encoder>-finetuned`` where it is), else None: the dataset's folder."""
    if config["feature_set"]:
        return str(config["feature_set"])
    if config["encoder"] is None:
        return None
    return f"{config['encoder']}-finetuned" if config["encoder_training"] == "finetuned" else str(config["encoder"])


def set_folder(config) -> Path:
    """Folder of the run's feature set: the one that is there, else the one to make.

    That is ``features/<name>`` in the dataset's folder, or in the user's cache where the dataset's folder is not ours to write to.
    """
    name = set_name(config)
    root = Path(config["data_path"])
    if name is None:
        return root
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"feature_set: expected the name of a folder under {root / 'features'}, got {name!r}.")
    beside = root / "features" / name
    return beside if feature_files(beside) else derived_folder(root) / "features" / name


def set_names(config) -> list[str]:
    """Names of the feature sets that the run's dataset has."""
    root = Path(config["data_path"])
    folders = [folder / "features" for folder in {root, derived_folder(root)}]
    return sorted({path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if feature_files(path)})


def open_table(path: Path) -> np.ndarray:
    """Open a feature file memory-mapped, [rows, F].

    Raises:
        UserError: when it is no .npy file of numbers with two axes, or cut short.
    """
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header with Python's tokenizer: a damaged one raises nearly anything
        size = path.stat().st_size if path.is_file() else 0
        raise UserError(
            f"{path} ({size:,} bytes): expected a whole .npy file of numbers, got something else or only a part ({error}). Write it again."
        ) from None
    if not isinstance(table, np.ndarray):
        raise UserError(f"{path}: expected one .npy table, got an .npz archive. Save its table with numpy.save.")
    if table.ndim != 2 or table.dtype.kind not in "fiu" or not table.shape[1]:
        raise UserError(f"{path}: expected a matrix of numbers, one row per item, got shape {table.shape} of {table.dtype}.")
    return table


def read_ids(folder: Path) -> list[str] | None:
    """Item tokens of the rows of a feature set, or None where it has no ``item_ids.txt``.

    Raises:
        UserError: when a token stands twice or the file is not UTF-8.
    """
    path = Path(folder) / IDS_FILE
    if not path.is_file():
        return None
    try:
        ids = path.read_bytes().decode("utf-8-sig").split("\n")  # read_text() would cut tokens at \r, splitlines() at U+2028 and the like
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected UTF-8 text, one item token per line.") from None
    ids = [token.strip() for token in ids]
    while ids and not ids[-1]:
        ids.pop()
    if len(set(ids)) < len(ids):
        seen: dict[str, int] = {}
        for line, token in enumerate(ids, start=1):
            if token in seen:
                raise UserError(f"{path}: the item {token!r} stands twice, in lines {seen[token]} and {line}. Each item has one row.")
            seen[token] = line
    return ids


def align(
    table: np.ndarray,
    ids: Sequence[str],
    tokens: Sequence[str],
    missing: str = "mean",
    where: str = "features",
    absent: Collection[str] = (),
) -> np.ndarray:
    """Rows of `table` in the order of RecBole's item ids.

    Args:
        table: [rows, F]; may be memory-mapped and of any float type.
        ids: token of each row.
        tokens: token of each item id; number 0 is padding.
        missing: what an item without a row gets: error, zero, or the mean of the rows of the others.
        where: the file, for messages.
        absent: tokens whose rows count as missing.

    Returns:
        float32 [len(tokens), F], row 0 zero.

    Raises:
        UserError: for a wrong number of rows, NaN or infinite values (with the row of the file), a missing row under ``error``, or when
            not one item has a row.
    """
    if missing not in MISSING:
        raise UserError(f"missing_modality: expected one of {', '.join(MISSING)}, got {missing!r}.")
    if len(ids) != len(table):
        hint = (
            " One more usually is the padding row: leave it out, row 0 of the file is the first item." if len(table) == len(ids) + 1 else ""
        )
        raise UserError(f"{where}: expected {len(ids)} feature rows, one for each item token in {IDS_FILE}, got {len(table)}.{hint}")
    row_of = {token: row for row, token in enumerate(ids) if token not in absent}
    rows = np.array([-1, *(row_of.get(str(token), -1) for token in tokens[1:])], dtype=np.int64)
    present = np.flatnonzero(rows >= 0)
    if not len(present):
        raise UserError(
            f"{where}: not one of the dataset's {len(tokens) - 1} items has a row. Items are named like {str(tokens[1])!r}, rows like {str(ids[0]) if ids else ''!r}: "
            f"{IDS_FILE} must hold the same item tokens as the .inter file."
        )
    aligned = np.zeros((len(tokens), table.shape[1]), np.float32)
    step = max(1, _CHUNK_BYTES // (4 * table.shape[1]))
    bad: list[int] = []
    for begin in range(0, len(present), step):
        items = present[begin : begin + step]
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which is reported below
            aligned[items] = table[rows[items]]
        bad += rows[items[~np.isfinite(aligned[items]).all(axis=1)]].tolist()
    if bad:
        row = min(bad)
        more = f", as do {len(bad) - 1} more rows" if len(bad) > 1 else ""
        raise UserError(
            f"{where}: row {row} (item {ids[row]!r}) holds NaN or an infinite number{more}. Features must be finite: "
            "put them right, or leave the rows and their tokens out and let missing_modality decide."
        )
    lacking = np.flatnonzero(rows < 0)[1:]
    if len(lacking):
        examples = ", ".join(repr(str(tokens[i])) for i in lacking[:3])
        if missing == "error":
            raise UserError(
                f"{where}: {len(lacking)} of {len(tokens) - 1} items have no row, e.g. {examples}. Add them, or set missing_modality to zero or mean."
            )
        if missing == "mean":
            aligned[lacking] = aligned[present].mean(axis=0, dtype=np.float64)
        logging.getLogger().warning(
            f"{where}: {len(lacking)} of {len(tokens) - 1} items have no row (e.g. {examples}); they get {'zeros' if missing == 'zero' else 'the mean of the others'}."
        )
    return aligned


def load_feature_set(
    folder: Path, tokens: Sequence[str], modalities: Sequence[str] | None = None, missing: str = "mean"
) -> dict[str, np.ndarray]:
    """Load and align the feature set in `folder`.

    Args:
        folder: see the top of this file.
        tokens: token of each item id; number 0 is padding.
        modalities: which ones, in this order; None for all.
        missing: see :func:`align`.

    Raises:
        UserError: for an unknown modality, or a file that does not fit; see :func:`align`.
    """
    folder = Path(folder)
    files = feature_files(folder)
    unknown = [name for name in modalities or () if name not in files]
    if unknown:
        raise UserError(
            f"Unknown modality {unknown[0]!r}.{nearest(unknown[0], files)} {folder} has {', '.join(files) or 'no feature files'}."
        )
    chosen = list(modalities) if modalities else list(files)
    if len(set(chosen)) < len(chosen):
        raise UserError(f"modalities: {chosen} names one twice.")
    ids, meta = read_ids(folder), _read_meta(folder)
    features = {}
    for name in chosen:
        table = open_table(files[name])
        _check_written(files[name], meta)
        rows = _ids_of_rows(ids, table, tokens, folder)
        absent = set((meta.get("missing") or {}).get(name, ()))  # rows that stand in the file although there was nothing to encode
        features[name] = align(table, rows, tokens, missing, str(files[name]), absent)
    return features


def _ids_of_rows(ids: list[str] | None, table: np.ndarray, tokens: Sequence[str], folder: Path) -> list[str]:
    """Without ``item_ids.txt`` row r belongs to the item called r, as in MMRec; other names cannot be guessed.

    Item 0 must be among them: where numbers begin with 1, row 0 may be item 1, and all rows would be one off without a word.
    """
    if ids is not None:
        return ids
    numbers = [str(row) for row in range(len(table))]
    names = {str(token) for token in tokens[1:]}
    if not names.issubset(numbers) or "0" not in names:
        raise UserError(
            f"{folder} has no {IDS_FILE}, and the dataset's items are not the numbers 0 to {len(table) - 1}. Write the item token of each feature row into {folder / IDS_FILE}, one per line."
        )
    return numbers


def _read_meta(folder: Path) -> dict:
    path = folder / META_FILE
    if not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{path} is no JSON. Make the feature set again with `recbole-mm extract`.") from None
    parts = [meta.get("outputs") or {}, meta.get("missing") or {}] if isinstance(meta, dict) else [None]
    kinds = (
        [(dict, part) for part in parts] + [(dict, v) for v in (parts[0] or {}).values()] if isinstance(parts[0], dict) else [(dict, None)]
    )
    if not all(isinstance(value, kind) for kind, value in kinds) or not all(isinstance(names, (list, dict)) for names in parts[1].values()):
        raise UserError(f"{path} is not what `recbole-mm extract` writes. Make the feature set again, or remove the file.")
    return meta


def _check_written(path: Path, meta: dict) -> None:
    """A file that is not the one meta.json speaks of makes every record of the run wrong."""
    expected = (meta.get("outputs") or {}).get(path.stem, {}).get("sha256")
    if expected and file_hash(path) != expected:
        raise UserError(
            f"{path} is not the file that {META_FILE} beside it describes: it was changed or cut short. Make the feature set again, or remove {META_FILE}."
        )


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_feature_set(folder: Path, tables: Mapping[str, np.ndarray], ids: Sequence[str], meta: Mapping) -> None:
    """Write a feature set, with the hash of each table in meta.json.

    It is written beside and moved to its place as a whole: tables without their item ids would be read as MMRec's.

    Raises:
        UserError: when a table has not one row per id, or a token cannot stand in a line of its own.
    """
    folder = Path(folder)
    for name, table in tables.items():
        if len(table) != len(ids):
            raise UserError(f"{folder / name}.npy: expected {len(ids)} rows, one per item token, got {len(table)}.")
    for token in ids:
        if "\n" in token or token != token.strip() or not token:
            raise UserError(f"{folder / IDS_FILE}: the item token {token!r} begins or ends with a blank, or holds a line break.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        outputs = {}
        for name, table in tables.items():
            path = fresh / f"{name}.npy"
            with atomic_path(path) as temporary:
                np.save(temporary, table)
            outputs[name] = {
                "rows": int(table.shape[0]),
                "columns": int(table.shape[1]),
                "dtype": str(table.dtype),
                "sha256": file_hash(path),
            }
        write_text(fresh / IDS_FILE, "".join(f"{token}\n" for token in ids))
        write_json(fresh / META_FILE, {**meta, "outputs": outputs})
        _move(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _move(fresh: Path, folder: Path) -> None:
    """Put the whole set `fresh` in the place of `folder`; other files that lie there (a dataset's own) stay."""
    os.chmod(fresh, 0o777 & ~_umask())  # mkdtemp makes 0700
    if folder.is_dir() and any(path.suffix != ".npy" and path.name not in (IDS_FILE, META_FILE) for path in folder.iterdir()):
        for path in sorted(fresh.iterdir(), key=lambda path: (path.name != IDS_FILE, path.name == META_FILE)):
            os.replace(path, folder / path.name)
        return
    old = folder.with_name(f"{fresh.name}.old")
    if folder.is_dir():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fingerprint(features: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names and values of aligned features."""
    digest = hashlib.sha256()
    for name, table in features.items():
        digest.update(f"{name}{table.shape}".encode())
        digest.update(np.ascontiguousarray(table).reshape(-1).view(np.uint8))
    return digest.hexdigest()
