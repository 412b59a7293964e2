"""Write a converted dataset: everything is built beside the target and moved there as a whole; what was dropped is counted."""

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from recbole_mm.data.features import write_feature_set
from recbole_mm.errors import UserError
from recbole_mm.files import write_json, write_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
#: pandas (and so RecBole) reads these as missing values
READ_AS_MISSING = frozenset(
    "nan NaN NA N/A n/a NULL null None <NA> -NaN -nan #N/A #NA 1.#IND 1.#QNAN -1.#IND -1.#QNAN".split() + ["#N/A N/A", ""]
)
_BLANK = re.compile(r"[\s\x00-\x1f\x7f\u2028\u2029]+")


def clean(value: Any) -> str:
    """One line of text without tabs, line breaks, control characters and double quotes, which atomic files cannot hold."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        value = " ".join(str(part) for part in value)
    text = str(value).encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be written
    return _BLANK.sub(" ", text).replace('"', "'").strip()


def token_problem(token: str) -> str | None:
    """Why `token` cannot be a user or item token of an atomic file, or None."""
    if token in READ_AS_MISSING:
        return "a user or item without a name (or one that reads as a missing value)"
    if token != clean(token):
        return "a user or item token with quotes, control characters or blanks at its ends"
    return None


def number(value: Any) -> str | None:
    """The value as a finite decimal number for a float column, or None."""
    try:
        x = float(value)
    except (TypeError, ValueError):
        return None
    if not np.isfinite(x):
        return None
    return str(int(x)) if x == int(x) and abs(x) < 2**53 else repr(x)


class Output:
    """A dataset in the making; use as a context manager. Nothing stands in `folder` until the block has ended well."""

    def __init__(self, folder: str | Path, overwrite: bool = False, command: str = ""):
        self.folder = Path(folder)
        self.name = self.folder.name
        self.overwrite = overwrite
        self.command = command
        self.counts: dict[str, int] = {}  # of what was read
        self.written: Counter = Counter()
        self.dropped: dict[str, Counter] = {}  # kind of record -> reason -> number
        self.notes: list[str] = []
        self.settings: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Output":
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name.startswith("."):
            raise UserError(f"--out: expected a folder whose name can be a dataset's (letters, digits, - and _), got {str(self.folder)!r}.")
        if self.folder.exists() and not self.overwrite:
            raise UserError(f"{self.folder} is there already. Choose another --out, or add --overwrite to replace it.")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.work = self.folder.with_name(f".{self.name}.partial")
        shutil.rmtree(self.work, ignore_errors=True)  # left by a conversion that was killed
        self.work.mkdir()
        self.scratch = self.work / ".scratch"
        self.scratch.mkdir()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._stack.close()
        if kind is not None:
            shutil.rmtree(self.work, ignore_errors=True)
            return
        try:
            self._complete()
        except BaseException:  # the disk is full, as a rule
            shutil.rmtree(self.work, ignore_errors=True)
            raise
        if self.folder.exists():
            old = self.folder.with_name(f".{self.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
            self.work.rename(self.folder)
            shutil.rmtree(old)
        else:
            self.work.rename(self.folder)

    def _complete(self) -> None:
        """What comes last: settings, record, card. The folder is whole before it gets its name."""
        from recbole_mm.data.card import write_card

        shutil.rmtree(self.scratch)
        if self.settings:
            text = yaml.safe_dump(self.settings, sort_keys=False, default_flow_style=None)
            write_text(self.work / f"{self.name}.yaml", f"# {self.name}: made by recbole-mm convert\n{text}")
        write_json(self.work / "convert.json", self.summary())
        write_card(self.work, self.name)

    def drop(self, kind: str, reason: str, n: int = 1) -> None:
        """Count `n` dropped records of `kind` (interactions, items, pictures ...)."""
        self.dropped.setdefault(kind, Counter())[reason] += n

    @contextmanager
    def table(self, suffix: str, fields: Sequence[str]):
        """Open ``<name>.<suffix>`` with typed `fields` (``rating:float``); yields a function that writes one row of cleaned values."""
        with open(self.work / f"{self.name}.{suffix}", "w", encoding="utf-8", newline="") as stream:
            stream.write("\t".join(fields) + "\n")

            def write(values: Iterable[Any]) -> None:
                stream.write("\t".join(values) + "\n")
                self.written[suffix] += 1

            yield write

    def features(self, name: str, tables: Mapping[str, np.ndarray], ids: Sequence[str], meta: Mapping) -> None:
        """A feature set under ``features/<name>``; the dataset's settings name it unless another was written before."""
        write_feature_set(self.work / "features" / name, tables, ids, {"source": self.command, **meta})
        self.settings.setdefault("feature_set", name)
        for modality, rows in tables.items():
            self.written[f"features {name}/{modality}"] = len(rows)

    def pictures(self, root: Path, source_of: Mapping[str, Path]) -> None:
        """Copy pictures, item token -> file below `root`, to ``images/<token><suffix>``."""
        from recbole_mm.data.content import open_picture

        root = root.resolve()
        folder = self.work / "images"
        folder.mkdir(exist_ok=True)
        for token, source in source_of.items():
            if not source.is_file():
                self.drop("pictures", "item without a picture file")
            elif not source.resolve().is_relative_to(root):
                self.drop("pictures", "file lies outside the source folder (a link or a path with ..)")
            elif Path(token).name != token or token in (".", "..") or "\\" in token:
                self.drop("pictures", "item token that cannot be a file name")
            else:
                try:
                    open_picture(source)
                except UserError:
                    self.drop("pictures", "not a readable picture")
                    continue
                shutil.copyfile(source, folder / f"{token}{source.suffix.lower()}")
                self.written["pictures"] += 1

    def summary(self) -> dict:
        return {
            "command": self.command,
            "read": self.counts,
            "written": dict(self.written),
            "dropped": {kind: dict(reasons) for kind, reasons in self.dropped.items()},
            "notes": self.notes,
        }

    def report(self) -> str:
        """What was read, written and dropped, for the console."""
        lines = [f"{self.folder}"]
        lines += [f"  read     {n:>12,}  {what}" for what, n in self.counts.items()]
        lines += [f"  written  {n:>12,}  {what}" for what, n in self.written.items()]
        lines += [f"  dropped  {n:>12,}  {kind}: {reason}" for kind, reasons in self.dropped.items() for reason, n in reasons.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def find_pictures(folder: Path) -> dict[str, Path]:
    """Stem -> picture file in `folder`."""
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: expected a JSON file ({error}).") from None


def required(folder: Path, *names: str) -> Path:
    """The first of `names` that exists in `folder`."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder}: expected the file {' or '.join(names)}, found {sorted(p.name for p in folder.iterdir())[:12] or 'nothing'}."
    )


def load_rows(path: Path) -> np.ndarray:
    """A feature file with one row per item."""
    from recbole_mm.data.features import open_table

    return open_table(path)


def csv_rows(path: Path, separator: str = "\t") -> Iterable[list[str]]:
    """Rows of a delimited text file."""
    csv.field_size_limit(1 << 24)
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            yield from csv.reader(stream, delimiter=separator)
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected UTF-8 text.") from None
    except csv.Error as error:
        raise UserError(f"{path}: expected columns separated by {separator!r} ({error}).") from None
