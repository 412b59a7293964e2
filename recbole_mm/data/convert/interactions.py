"""From records of any source to ``.inter`` files: the second pass, the split, and the settings that go with it."""

import argparse
from collections.abc import Callable, Iterable, Mapping

from recbole_mm.data.convert.core import Row, select
from recbole_mm.data.convert.output import Output, clean, number, token_problem
from recbole_mm.errors import UserError

LEAVE_ONE_OUT = {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"}
PARTS = ("train", "valid", "test")


def add_filter_arguments(parser: argparse.ArgumentParser, k: int = 0) -> None:
    """The flags of every format whose interactions are filtered and split here."""
    parser.add_argument(
        "--k-core", type=int, default=k, help=f"every user and item keeps at least so many interactions (default {k or 'off'})"
    )
    parser.add_argument(
        "--split",
        choices=("loo", "8:1:1", "none"),
        default="loo",
        help="loo: leave one out by time (default); 8:1:1: ready split files, at random within each user; none: left to eval_args",
    )
    parser.add_argument("--split-seed", type=int, default=2020)


def checked(row: Row) -> Row:
    """The row, or why it is dropped: its tokens cannot be written."""
    if row.dropped is None:
        row.dropped = token_problem(row.user) or token_problem(row.item)
    return row


def write_interactions(
    output: Output,
    records: Callable[[str], Iterable[Row]],
    fields: Mapping[str, str],
    args: argparse.Namespace,
    seen: Callable[[Row], None] | None = None,
) -> tuple[set[str], set[str]]:
    """Filter, split and write the records; return the user and item tokens that stayed.

    Args:
        records: starts a pass, told ``"1st pass"`` or ``"2nd pass"`` for its progress bar.
        fields: name -> type of the columns after user and item; a row's missing text is empty, its missing number drops it.
        seen: called with every row that is written.
    """
    if args.k_core < 0:
        raise UserError(f"--k-core: expected a number from 0, got {args.k_core}.")
    if args.split == "loo" and "timestamp" not in fields:
        raise UserError("--split=loo needs times, and this source gives none. Name a timestamp column, or take --split=8:1:1 or none.")
    floats = [name for name, kind in fields.items() if kind == "float"]

    def rows(label: str) -> Iterable[Row]:
        for row in records(label):
            checked(row)
            if row.dropped is None:
                for name in floats:
                    row.values[name] = number(row.values.get(name))
                    if row.values[name] is None:
                        row.dropped = f"{name} is missing or no number"
                        break
            yield row

    ready = args.split == "8:1:1"
    chosen = select(lambda: rows("1st pass"), output.scratch, args.k_core, "8:1:1" if ready else None, args.split_seed)
    output.counts["interactions"] = chosen.read
    for reason, n in chosen.dropped.items():
        output.drop("interactions", reason, n)
    if not chosen.keep.any():
        reasons = ", ".join(f"{reason} ({n:,})" for reason, n in chosen.dropped.most_common(3)) or "the source is empty"
        raise UserError(f"No interaction is left of {chosen.read:,} read: {reasons}. Lower --k-core or check --src.")

    header = ["user_id:token", "item_id:token", *(f"{name}:{kind}" for name, kind in fields.items())]
    users: set[str] = set()
    items: set[str] = set()
    from contextlib import ExitStack

    with ExitStack() as stack:
        suffixes = [f"{part}.inter" for part in PARTS] if ready else ["inter"]
        writers = [stack.enter_context(output.table(suffix, header)) for suffix in suffixes]
        kept = -1
        for keep, row in zip(chosen.keep, rows("2nd pass")):
            if not keep:
                continue
            kept += 1
            values = [row.values[name] if kind == "float" else clean(row.values.get(name)) for name, kind in fields.items()]
            writers[chosen.split[kept] if ready else 0]([row.user, row.item, *values])
            users.add(row.user)
            items.add(row.item)
            if seen:
                seen(row)
    output.written["users"], output.written["items"] = len(users), len(items)
    if ready:
        output.settings["benchmark_filename"] = list(PARTS)
    elif args.split == "loo":
        output.settings["eval_args"] = LEAVE_ONE_OUT
    slim = ["user_id", "item_id", *floats]
    if len(slim) < len(fields) + 2:
        output.settings["load_col"] = {"inter": slim}
    return users, items
