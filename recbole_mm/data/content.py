"""Item pictures and texts: found by item token, read on demand, decoded once for training.

The dataset comes from somebody else as a rule. So pictures are only ever found by listing one folder (a token with ``../`` in it names
nothing), links out of the dataset are refused, and no picture of absurd size is decoded.
"""

import csv
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from recbole_mm.errors import UserError
from recbole_mm.files import atomic_path, clear_leftovers, derived_folder, locked

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_PIXELS = 50_000_000  # a 50-megapixel photo is allowed; decoded it takes 150 MB
TITLE_FIELDS = ("title", "name", "movie_title", "item_title")

ImageFile.LOAD_TRUNCATED_IMAGES = False


class ItemContent:
    """Pictures and texts of the items of a dataset.

    Args:
        folder: the dataset's folder.
        tokens: token of each item id; number 0 is padding.
        text_fields: columns of ``<name>.item`` that make an item's text; absent ones are skipped.
        image_folder: folder with ``<token>.jpg`` (or .jpeg, .png, .webp, .gif, .bmp), in the dataset's folder or absolute.
        name: the dataset's name; the folder's by default.
        separator: of the columns.
        id_field: the column with the item tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        tokens: Sequence[str],
        text_fields: Sequence[str] = ("title", "description", "brand", "categories"),
        image_folder: str = "images",
        name: str | None = None,
        separator: str = "\t",
        id_field: str = "item_id",
    ):
        self.folder = Path(folder)
        self.tokens = [str(token) for token in tokens]
        self.text_fields = tuple(text_fields)
        self._table_path = self.folder / f"{name or self.folder.name}.item"
        self._separator, self._id_field = separator, id_field
        self._columns: dict[str, list[str]] | None = None
        self._images = self._find_images(image_folder)
        self._pixels: dict[str, tuple[np.ndarray, dict[str, int]]] = {}

    @classmethod
    def from_config(cls, config, dataset) -> "ItemContent":
        """The content of a run's dataset."""
        tokens = dataset.field2id_token[dataset.iid_field]
        return cls(
            config["data_path"],
            tokens,
            config["text_fields"] or (),
            config["image_folder"] or "images",
            config["dataset"],
            config["field_separator"],
            config["ITEM_ID_FIELD"],
        )

    # texts

    def read_table(self) -> pd.DataFrame | None:
        """The item file as raw strings, or None where the dataset has none."""
        if not self._table_path.is_file():
            return None
        try:
            table = pd.read_csv(self._table_path, sep=self._separator, dtype=str, keep_default_na=False, encoding="utf-8")
        except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError, csv.Error) as error:
            raise UserError(
                f"{self._table_path}: expected UTF-8 text with columns separated by {self._separator!r} and a first line of field names ({error})."
            ) from None
        table.columns = [str(column).split(":")[0] for column in table.columns]
        return table

    def _key(self, table: pd.DataFrame) -> str:
        return self._id_field if self._id_field in table else table.columns[0]

    def _item_tokens(self) -> list[str]:
        table = self.read_table()
        return [] if table is None else table[self._key(table)].tolist()

    def _read(self) -> dict[str, list[str]]:
        """Columns of the item file by field name, in the order of `tokens`; empty strings where an item or field is absent."""
        if self._columns is not None:
            return self._columns
        table = self.read_table()
        if table is None:
            self._columns = {}
            return self._columns
        row_of: dict[str, int] = {}
        for row, token in enumerate(table[self._key(table)]):
            row_of.setdefault(token, row)  # of an item that stands there twice the first row counts, as in RecBole
        rows = [row_of.get(token, -1) for token in self.tokens]
        rows[0] = -1
        columns = {column: table[column].tolist() for column in table.columns}
        self._columns = {column: [values[row] if row >= 0 else "" for row in rows] for column, values in columns.items()}
        return self._columns

    @classmethod
    def catalogue(cls, config) -> "ItemContent":
        """The content of every item that the files of a run's dataset know, whether anybody interacted with it or not.

        Raises:
            UserError: when an item token cannot stand in a line of ``item_ids.txt``.
        """
        settings = (config["text_fields"] or (), config["image_folder"] or "images", config["dataset"], config["field_separator"])
        probe = cls(config["data_path"], ["[PAD]"], *settings, config["ITEM_ID_FIELD"])
        tokens = [*probe._item_tokens(), *sorted(probe.pictures)]
        for token in tokens:
            if token != token.strip() or "\n" in token:
                raise UserError(f"{probe.folder}: the item token {token!r} begins or ends with a blank, or holds a line break. Rename it.")
        return cls(config["data_path"], ["[PAD]", *dict.fromkeys(token for token in tokens if token)], *settings, config["ITEM_ID_FIELD"])

    @property
    def fields(self) -> list[str]:
        """Columns of the item file."""
        return list(self._read())

    def field(self, name: str, item: int) -> str:
        """Value of one column for one item; empty where it is absent."""
        column = self._read().get(name)
        return column[item].strip() if column is not None else ""

    @property
    def has_texts(self) -> bool:
        """Whether any item has a text."""
        columns = self._read()
        return any(value.strip() for field in self.text_fields for value in columns.get(field, ()))

    def title(self, item: int) -> str:
        """The item's title, or what comes nearest to one; empty where the dataset has none."""
        for name in TITLE_FIELDS:
            if value := self.field(name, item):
                return value
        return ""

    def text(self, item: int) -> str:
        """The text fields of an item joined by ". ", in the order of `text_fields`; empty where it has none."""
        parts = [self.field(name, item).rstrip(" .") for name in self.text_fields]
        return ". ".join(part for part in parts if part)

    def texts(self, items: Iterable[int]) -> list[str]:
        return [self.text(int(item)) for item in items]

    # pictures

    def _find_images(self, image_folder: str) -> dict[str, Path]:
        """Token -> picture, from one listing of the folder."""
        folder = self.folder / image_folder
        if not folder.is_dir():
            return {}
        inside = folder.resolve()
        if not Path(image_folder).is_absolute() and not inside.is_relative_to(self.folder.resolve()):
            raise UserError(f"{folder} leads out of the dataset, to {inside}. If that is meant, set image_folder to that path.")
        found: dict[str, Path] = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)
                if suffix.lower() not in SUFFIXES or not entry.is_file():  # reading a pipe would wait for ever
                    continue
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside):
                    raise UserError(f"{entry.path} is a link out of the dataset, to {os.readlink(entry.path)}. Copy the picture instead.")
                earlier = found.get(stem)
                if earlier is None or SUFFIXES.index(suffix.lower()) < SUFFIXES.index(earlier.suffix.lower()):
                    found[stem] = Path(entry.path)
        return found

    @property
    def pictures(self) -> dict[str, Path]:
        """Every picture of the folder by the token it is named by, whether or not there is such an item."""
        return self._images

    @property
    def has_images(self) -> bool:
        """Whether any item has a picture."""
        return any(token in self._images for token in self.tokens[1:])

    def image_path(self, item: int) -> Path | None:
        """The item's picture file, or None."""
        return self._images.get(self.tokens[item]) if item > 0 else None

    def image(self, item: int) -> Image.Image:
        """The item's picture, RGB.

        Raises:
            UserError: when it has none, or the file is broken or absurdly large.
        """
        path = self.image_path(item)
        if path is None:
            raise UserError(f"The item {self.tokens[item]!r} has no picture in {self.folder}.")
        return open_picture(path)

    def image_tensor(self, items: Iterable[int], transform) -> Tensor:
        """Resized pictures of items, uint8 [B, 3, S, S]; zeros for an item without one.

        All pictures are decoded on the first call and kept on disk as one memory map, named after everything that shapes it.

        Args:
            items: item ids.
            transform: its ``resize(picture)`` gives uint8 [3, S, S], ``describe()`` names it.
        """
        pixels, row_of = self._cached(transform)
        rows = [row_of.get(self.tokens[item], -1) if item > 0 else -1 for item in map(int, items)]
        batch = np.zeros((len(rows), *pixels.shape[1:]), np.uint8)
        for place, row in enumerate(rows):
            if row >= 0:
                batch[place] = pixels[row]
        return torch.from_numpy(batch)

    def _cached(self, transform) -> tuple[np.ndarray, dict[str, int]]:
        names = sorted(self._images)
        stats = [(name, self._images[name].name, *_stamp(self._images[name])) for name in names]
        key = hashlib.sha256(json.dumps([transform.describe(), stats], sort_keys=True).encode()).hexdigest()[:24]
        if key not in self._pixels:
            path = derived_folder(self.folder) / ".cache" / f"pixels-{key}.npy"
            if not path.is_file():
                with locked(path.with_name(f".{path.stem}.lock")):  # several processes may want it at once; one decodes
                    clear_leftovers(path.parent, path.stem)
                    if not path.is_file():
                        self._decode_all(names, transform, path)
            self._pixels[key] = np.load(path, mmap_mode="r", allow_pickle=False), {name: row for row, name in enumerate(names)}
        return self._pixels[key]

    def _decode_all(self, names: list[str], transform, path: Path) -> None:
        """Decode every picture in threads (Pillow releases the interpreter) into one file that appears when it is whole."""
        if not names:
            raise UserError(f"{self.folder} has no pictures.")
        broken: dict[int, UserError] = {}

        def decode(row: int) -> np.ndarray | None:
            try:
                return transform.resize(open_picture(self._images[names[row]])).numpy()
            except UserError as error:
                broken[row] = error
                return None

        shape = next((picture.shape for picture in map(decode, range(len(names))) if picture is not None), (3, 1, 1))
        with atomic_path(path) as temporary:
            pixels = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(len(names), *shape))
            if hasattr(os, "posix_fallocate"):
                with open(temporary, "rb+") as stream:  # a full disk is an error here and a crash when the map is written to
                    os.posix_fallocate(stream.fileno(), 0, os.path.getsize(temporary))
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                decoded = tqdm(
                    pool.map(decode, range(len(names))), total=len(names), desc="Decode pictures", delay=2, leave=False, ncols=100
                )
                for row, picture in enumerate(decoded):
                    if picture is not None:
                        pixels[row] = picture
            if broken:
                first = broken[min(broken)]
                raise UserError(str(first) if len(broken) == 1 else f"{len(broken)} pictures cannot be read. The first: {first}")
            pixels.flush()


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def open_picture(path: Path) -> Image.Image:
    """Decode one picture to RGB.

    Raises:
        UserError: for a file that is no whole picture, or has more than 50 million pixels (a small file can name a size that fills the memory).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS or not width or not height:
                    raise UserError(
                        f"{path} claims {width} x {height} pixels; more than {MAX_PIXELS:,} are refused. Make it smaller or remove it."
                    )
                return picture.convert("RGB")
    except UserError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, MemoryError) as error:
        raise UserError(
            f"{path} is no picture that can be read ({' '.join(str(error).split()) or type(error).__name__}). Replace it, or remove it: then missing_modality decides."
        ) from None
