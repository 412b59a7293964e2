"""Small sources for the converters' tests, and how to read what they write."""

import json
from pathlib import Path

from recbole_mm.data.convert import main


def run(*arguments) -> int:
    """``recbole-mm convert`` without progress bars."""
    return main([*map(str, arguments), "--no-progress"])


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of an atomic file, field names without types."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    names = [name.split(":")[0] for name in header.split("\t")]
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(row["user_id"], row["item_id"]) for row in rows(path)]


def counts(folder: Path) -> dict:
    return json.loads((folder / "convert.json").read_text())


def balanced(folder: Path, written: int) -> bool:
    """Everything that was read is written or counted as dropped."""
    about = counts(folder)
    return about["read"]["interactions"] == written + sum(about["dropped"].get("interactions", {}).values())
