"""Choose interactions in two passes over a file of any size: repeated pairs out, k-core, split.

The first pass keeps 16 bytes a row on disk (64-bit hashes of user and item); with n rows the chance that two different tokens share a
hash is about n² / 4e19, one in ten thousand for 50 million. Users and items that cannot have k interactions are first sorted out by
counting in buckets, which needs no table of tokens; only what is left is counted exactly in memory.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 1 << 20
PAIR = np.dtype([("user", "<u8"), ("item", "<u8")])
EXACT_ROWS = 2_000_000  # so many rows are counted exactly without more ado

TRAIN, VALID, TEST = 0, 1, 2


@dataclass
class Row:
    """One interaction of a source, or the reason why a record is none."""

    user: str = ""
    item: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    dropped: str | None = None


@dataclass
class Selection:
    """Which records of the source stay, in the order of the source."""

    keep: np.ndarray  # bool, one per record
    split: np.ndarray | None  # TRAIN, VALID or TEST of each kept record
    read: int
    dropped: Counter


def hash_token(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def select(records: Callable[[], Iterable[Row]], scratch: Path, k: int = 0, split: str | None = None, seed: int = 2020) -> Selection:
    """First pass: read all records of the source and decide which stay.

    Args:
        records: starts a pass over the source; both passes must give the same records.
        scratch: a folder for the temporary file.
        k: every user and item keeps at least k interactions (0 and 1: no filter).
        split: ``8:1:1`` (at random within each user, from `seed`) or None.
    """
    dropped: Counter = Counter()
    valid = bytearray()
    path = scratch / "pairs.bin"
    with open(path, "wb") as stream:
        buffer = np.empty(CHUNK, PAIR)
        filled = 0
        for row in records():
            valid.append(row.dropped is None)
            if row.dropped is not None:
                dropped[row.dropped] += 1
                continue
            buffer[filled] = (hash_token(row.user), hash_token(row.item))
            filled += 1
            if filled == CHUNK:
                stream.write(buffer.data)  # not tofile: it loses rows without a word when the disk is full
                filled = 0
        stream.write(buffer[:filled].data)
    usable = np.frombuffer(valid, np.uint8).astype(bool)
    pairs = np.memmap(path, PAIR, "r") if path.stat().st_size else np.empty(0, PAIR)
    rows, user, repeated = choose(pairs, k)
    del pairs
    path.unlink()
    if repeated:
        dropped["the same user and item again"] += repeated
    if lost := int(usable.sum()) - repeated - len(rows):
        dropped[f"user or item with fewer than {k} interactions"] += lost
    keep = np.zeros(len(usable), bool)
    keep[np.flatnonzero(usable)[rows]] = True
    return Selection(keep, _split(user, seed) if split else None, len(usable), dropped)


def choose(pairs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Which of `pairs` stay: the first of each that is in the k-core.

    Takes 1 byte a row and about 40 more (and 16 of the mapped file) for each row whose user and item may have k interactions (benchmarks/convert_memory.py).

    Returns:
        their rows, the number of each one's user, and how many were repetitions.
    """
    rows = np.flatnonzero(_prefilter(pairs, k) if k > 1 else np.ones(len(pairs), bool)).astype(
        np.uint32 if len(pairs) < 2**32 else np.int64
    )
    user, item = (_codes(pairs[key][rows]) for key in ("user", "item"))
    first = _first_of_each_pair(user, item)
    repeated = int(len(rows) - np.count_nonzero(first))
    rows, user, item = rows[first], user[first], item[first]
    inside = _exact_core(user, item, k)
    return rows[inside], user[inside], repeated


def _codes(hashes: np.ndarray) -> np.ndarray:
    """The distinct values numbered from 0 in their order, int32; numpy.unique takes twice the memory for it."""
    codes = np.empty(len(hashes), np.int32)
    order = np.argsort(hashes)
    hashes = hashes[order]
    new = np.empty(len(hashes), np.int32)
    new[:1] = 0
    np.not_equal(hashes[1:], hashes[:-1], out=new[1:], casting="unsafe")
    del hashes
    codes[order] = np.cumsum(new, out=new)
    return codes


def _prefilter(pairs: np.ndarray, k: int) -> np.ndarray:
    """Rows whose user and item may reach k: a bucket holds at least as many rows as each token in it, so nothing is lost wrongly."""
    stay = np.ones(len(pairs), bool)
    buckets = min(1 << 26, 1 << max(10, (2 * len(pairs)).bit_length()))
    while stay.sum() > EXACT_ROWS:
        before = int(stay.sum())
        for key in ("user", "item"):
            counts = np.zeros(buckets, np.int32)
            for start in range(0, len(pairs), CHUNK):
                part = pairs[key][start : start + CHUNK][stay[start : start + CHUNK]]
                np.add.at(counts, (part & np.uint64(buckets - 1)).astype(np.int64), 1)
            for start in range(0, len(pairs), CHUNK):
                part = (pairs[key][start : start + CHUNK] & np.uint64(buckets - 1)).astype(np.int64)
                stay[start : start + CHUNK] &= counts[part] >= k
        if before - stay.sum() < 0.02 * before:
            break
    return stay


def _first_of_each_pair(user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Bool per row: whether no row before it has the same user and item."""
    first = np.zeros(len(user), bool)
    if not len(user):
        return first
    keys = user.astype(np.int64)
    keys *= int(item.max()) + 1
    keys += item
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    new = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    first[order[new]] = True
    return first


def _exact_core(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """Bool per row: in the largest subset in which every user and every item has at least k rows."""
    inside = np.ones(len(user), bool)
    while k > 1 and inside.any():
        users = np.bincount(user[inside], minlength=int(user.max()) + 1)
        items = np.bincount(item[inside], minlength=int(item.max()) + 1)
        next_ = inside & (users[user] >= k) & (items[item] >= k)
        if (next_ == inside).all():
            break
        inside = next_
    return inside


def _split(user: np.ndarray, seed: int) -> np.ndarray:
    """8:1:1 within each user at random; a user with fewer than 3 interactions has them all in training, others at least one in each part."""
    order = np.lexsort((np.random.default_rng(seed).random(len(user)), user))
    sizes = np.bincount(user, minlength=int(user.max()) + 1 if len(user) else 0)
    place = np.arange(len(user)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    size = np.repeat(sizes, sizes)
    held = np.where(size >= 3, np.maximum(1, np.rint(0.1 * size)), 0)
    parts = np.where(place < held, TEST, np.where(place < 2 * held, VALID, TRAIN))
    result = np.empty(len(user), np.int8)
    result[order] = parts
    return result
