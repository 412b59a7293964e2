"""Amazon reviews of 2014, 2018 and 2023 with their metadata.

Reviews: one JSON object a line (2014 and 2018: ``reviewerID, asin, overall, unixReviewTime, reviewText, summary, reviewerName``; 2023:
``user_id, parent_asin, rating, timestamp`` in milliseconds, ``title, text``). Metadata: JSON, in 2014 Python literals. Both plain or
``.gz``, read line by line: memory grows with what stays after the filter, not with the file.
"""

import argparse
import ast
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from recbole_mm.data.convert.core import Row
from recbole_mm.data.convert.interactions import add_filter_arguments, write_interactions
from recbole_mm.data.convert.output import Output, clean
from recbole_mm.errors import UserError

SUMMARY = "reviews (json, jsonl, .gz) of 2014, 2018 or 2023 and item metadata"
MAX_LITERAL = 1_000_000  # characters of a line that is parsed as a Python literal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--meta", type=Path, help="metadata file of the items")
    parser.add_argument("--no-text", action="store_true", help="leave review texts and headlines out of .inter")
    add_filter_arguments(parser, k=5)
    parser.add_argument(
        "--download", action="store_true", help="fetch the pictures in images.csv at once (else: recbole-mm convert pictures)"
    )
    parser.add_argument("--rate", type=float, default=2.0, help="pictures a second, at the most")


def lines(path: Path, label: str, progress: bool = True) -> Iterator[bytes]:
    """Lines of a plain or gzip file, with a progress bar over its bytes."""
    from tqdm import tqdm

    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the reviews file with --src and the metadata with --meta.")
    with (
        open(path, "rb") as raw,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"{path.name} {label}", disable=not progress) as bar,
    ):
        stream = gzip.GzipFile(fileobj=raw) if raw.read(2) == b"\x1f\x8b" else raw
        raw.seek(0)
        try:
            for count, line in enumerate(stream):
                if not count % 20_000:
                    bar.update(raw.tell() - bar.n)
                yield line
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}: the compressed file is damaged or cut short ({error}). Fetch it again.") from None
        bar.update(raw.tell() - bar.n)


def parse(line: bytes) -> dict | None:
    """The object in a line: JSON, or a Python literal as in the 2014 metadata; None when it is neither."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        text = line.decode("utf-8", "replace")
        if len(text) > MAX_LITERAL:
            return None
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def review(record: dict) -> Row:
    """One review of any of the three editions."""
    new = "parent_asin" in record or "user_id" in record
    time = record.get("timestamp") if new else record.get("unixReviewTime")
    if new and isinstance(time, (int, float)):
        time = time / 1000
    return Row(
        user=str(record.get("user_id" if new else "reviewerID") or ""),
        item=str((record.get("parent_asin") or record.get("asin")) or ""),
        values={
            "rating": record.get("rating" if new else "overall"),
            "timestamp": time,
            "summary": record.get("title" if new else "summary"),
            "review": record.get("text" if new else "reviewText"),
            "name": record.get("reviewerName"),
        },
    )


def picture_url(record: dict) -> str:
    """Address of an item's main picture; empty where there is none."""
    images = record.get("images")
    if isinstance(images, list) and images and isinstance(images[0], dict):
        return str(images[0].get("large") or images[0].get("hi_res") or images[0].get("thumb") or "")
    for key in ("imageURLHighRes", "imageURL", "imUrl"):
        if value := record.get(key):
            return str(value[0] if isinstance(value, list) else value)
    return ""


def item_values(record: dict) -> list[str]:
    """Title, description, brand, categories, price of a metadata record."""
    categories = record.get("categories") or record.get("category") or []
    if isinstance(categories, list) and categories and isinstance(categories[0], list):
        categories = categories[0]  # 2014: several paths, the first is the main one
    brand = record.get("brand") or record.get("store")
    return [clean(record.get("title")), clean(record.get("description")), clean(brand), clean(categories), clean(record.get("price"))]


def convert(args: argparse.Namespace, output: Output) -> None:
    names: dict[str, str] = {}

    def records(label: str) -> Iterator[Row]:
        for line in lines(args.src, label, args.progress):
            if not line.strip():
                continue
            record = parse(line)
            yield review(record) if record is not None else Row(dropped="a line that is no JSON object")

    def remember(row: Row) -> None:
        if row.values.get("name") and row.user not in names:
            names[row.user] = clean(row.values["name"])

    fields = {"rating": "float", "timestamp": "float"}
    if not args.no_text:
        fields |= {"summary": "token_seq", "review": "token_seq"}
    _users, items = write_interactions(output, records, fields, args, remember)
    if names:
        with output.table("user", ["user_id:token", "name:token_seq"]) as write:
            for user, name in names.items():
                write([user, name])
    if args.meta:
        _write_items(args, output, items)


def _write_items(args: argparse.Namespace, output: Output, items: set[str]) -> None:
    waiting = set(items)
    read = pictures = 0
    header = ["item_id:token", "title:token_seq", "description:token_seq", "brand:token_seq", "categories:token_seq", "price:token"]
    with output.table("item", header) as write, open(output.work / "images.csv", "w", encoding="utf-8", newline="") as listing:
        listing.write("item_id,url\n")
        for line in lines(args.meta, "", args.progress):
            if not line.strip():
                continue
            read += 1
            record = parse(line)
            if record is None:
                output.drop("items", "a line that is neither JSON nor a Python literal")
                continue
            token = str(record.get("parent_asin") or record.get("asin") or "")
            if token not in waiting:
                output.drop("items", "metadata given twice" if token in items else "metadata of an item without interactions")
                continue
            waiting.discard(token)
            write([token, *item_values(record)])
            url = picture_url(record)
            if url.startswith(("http://", "https://")) and not set(url) & set(' ,"\r\n'):
                listing.write(f"{token},{url}\n")
                pictures += 1
            else:
                output.drop("pictures", "item without a picture address")
        for token in sorted(waiting):
            write([token, "", "", "", "", ""])
    output.counts["metadata records"] = read
    output.written["picture addresses"] = pictures
    if waiting:
        output.notes.append(f"{len(waiting):,} items have no metadata; they stand in .item with empty texts")
