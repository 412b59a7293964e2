"""What VIP5 reads beyond interactions: whole sequences, reviews, names and titles, and the numbers that stand for users and items."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_mm.data.content import ItemContent
from recbole_mm.data.user_sequence import UserSequenceDataset
from recbole_mm.errors import UserError
from recbole_mm.model.vip5.prompts import Facts
from recbole_mm.model.vip5.samples import Records, Sequences

#: prompt argument -> setting that names its column
COLUMN_OF = {
    "explanation": "explanation_field",
    "feature": "feature_field",
    "review_headline": "headline_field",
    "star_rating": "RATING_FIELD",
    "user_desc": "user_name_field",
    "item_title": "title_field",
}


class VIP5Dataset(UserSequenceDataset):
    """One sequence per user, and for every part also the whole sequences, which candidate lists must not repeat items of."""

    def build(self):
        parts = super().build()
        users = np.concatenate([part.inter_feat[self.uid_field].numpy() for part in parts])
        items = np.concatenate([part.inter_feat[self.iid_field].numpy() for part in parts])
        order = np.argsort(users, kind="stable")  # parts follow one another in time, and each is sorted by it
        begin = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=self.user_num))])
        train = np.bincount(parts[0].inter_feat[self.uid_field].numpy(), minlength=self.user_num)
        later = np.bincount(parts[1].inter_feat[self.uid_field].numpy(), minlength=self.user_num)
        for part in parts:
            part.whole_sequences = Sequences(items[order], begin, train)
            part.valid_counts = later
        return parts


def read_columns(files: Sequence[Path], columns: Sequence[str], separator: str) -> pd.DataFrame:
    """The given columns, as text, of atomic files with the same header; columns the files lack are left out.

    Raises:
        UserError: when a file is not such a table.
    """
    tables = []
    for file in files:
        try:
            table = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8", quoting=csv.QUOTE_NONE)
        except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            raise UserError(f"{file}: expected UTF-8 text with columns separated by {separator!r} ({error}).") from None
        table.columns = [str(column).split(":")[0] for column in table.columns]
        tables.append(table[[column for column in columns if column in table]])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def read_records(config, dataset) -> tuple[Records | None, set[str]]:
    """Reviews of the dataset's ``.inter`` files and the prompt arguments they can fill.

    ``explanation_split: leave_one_out`` gives a review the part its interaction is in; ``random`` is the release's: 8:1:1, and one review
    of every user and of every item is for training.
    """
    folder, name = Path(config["data_path"]), config["dataset"]
    parts = config["benchmark_filename"]
    files = [folder / f"{name}.{part}.inter" for part in parts] if parts else [folder / f"{name}.inter"]
    columns = {argument: config[COLUMN_OF[argument]] for argument in ("explanation", "feature", "review_headline", "star_rating")}
    uid, iid = dataset.uid_field, dataset.iid_field
    table = read_columns([f for f in files if f.is_file()], [uid, iid, *columns.values()], config["field_separator"])
    available = {argument for argument, column in columns.items() if column in table}
    if not {uid, iid} <= set(table.columns) or "explanation" not in available:
        return None, available
    user = table[uid].map(dataset.field2token_id[uid])
    item = table[iid].map(dataset.field2token_id[iid])
    kept = (user.notna() & item.notna() & (table[columns["explanation"]].str.strip() != "")).to_numpy()
    table, user, item = table[kept], user[kept].astype(np.int64).to_numpy(), item[kept].astype(np.int64).to_numpy()

    def texts(argument: str) -> list[str]:
        return table[columns[argument]].str.strip().tolist() if argument in available else [""] * len(table)

    rating = pd.to_numeric(table[columns["star_rating"]], errors="coerce") if "star_rating" in available else np.full(len(table), np.nan)
    if config["published"] or config["explanation_split"] == "random":
        part = _random_parts(user, item, config["seed"])
    else:
        part = _parts_of_interactions(user, item, dataset)
    records = Records(
        user, item, texts("explanation"), texts("feature"), texts("review_headline"), np.asarray(rating, dtype=np.float64), part
    )
    return (records if len(user) else None), available


def _parts_of_interactions(user: np.ndarray, item: np.ndarray, dataset) -> np.ndarray:
    """0, 1 or 2 for reviews of training, validation and test interactions; -1 for what is in none."""
    sequences, later = dataset.whole_sequences, dataset.valid_counts
    owner = np.repeat(np.arange(len(sequences.begin) - 1), np.diff(sequences.begin))
    place = np.arange(len(owner)) - sequences.begin[owner]
    number = np.where(place < sequences.train[owner], 0, np.where(place < sequences.train[owner] + later[owner], 1, 2))
    keys = owner * dataset.item_num + sequences.items
    order = np.argsort(keys, kind="stable")
    keys, number = keys[order], number[order]
    wanted = user * dataset.item_num + item
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, number[at], -1)


def _random_parts(user: np.ndarray, item: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 811])
    part = rng.choice(3, size=len(user), p=(0.8, 0.1, 0.1))
    order = rng.permutation(len(user))
    for ids in (user, item):
        part[order[np.unique(ids[order], return_index=True)[1]]] = 0
    return part


def read_facts(config, dataset, offset_users: bool) -> Facts:
    """Numbers, user names and titles; numbers are drawn from the run's seed (see ``item_numbers``).

    Args:
        offset_users: users' numbers follow the items', so that no number means both; for tokenizers with one piece per number.
    """
    rng = np.random.default_rng([config["seed"], 17])
    n_users, n_items = dataset.user_num, dataset.item_num
    users, items = np.zeros(n_users, dtype=np.int64), np.zeros(n_items, dtype=np.int64)
    order = 1 + rng.permutation(n_users - 1)
    users[order] = np.arange(1, n_users)
    if config["published"] or config["item_numbers"] == "appearance":
        sequences = dataset.whole_sequences
        seen = np.concatenate([sequences.of(user) for user in order] + [np.arange(1, n_items)])
        first = np.sort(np.unique(seen, return_index=True)[1])
        items[seen[first]] = np.arange(1, n_items)
    else:
        items[1 + rng.permutation(n_items - 1)] = np.arange(1, n_items)
    if offset_users:
        users[1:] += n_items - 1
    return Facts(users, items, _user_names(config, dataset), _titles(config, dataset))


def factorise(users: np.ndarray, items: np.ndarray, n_users: int, n_items: int, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of users [U, R] and items [I, R] such that those that interact point the same way; zero rows without interaction.

    The truncated singular value decomposition of the interactions, each divided by the root of both degrees. Its first component is left
    out: it is the degrees themselves, the same direction for everyone.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import svds

    pairs = np.unique(np.stack([users, items], 1), axis=0)
    degree = [np.maximum(np.bincount(pairs[:, side], minlength=n), 1) ** -0.5 for side, n in enumerate((n_users, n_items))]
    matrix = csr_matrix((degree[0][pairs[:, 0]] * degree[1][pairs[:, 1]], (pairs[:, 0], pairs[:, 1])), shape=(n_users, n_items))
    rank = min(rank + 1, min(matrix.shape) - 1)
    left, size, right = svds(matrix, k=rank, v0=np.random.default_rng(seed).normal(size=min(matrix.shape)))
    kept = np.argsort(-size)[1:]
    vectors = (left[:, kept] * size[kept], right.T[:, kept] * size[kept])
    length = [np.linalg.norm(v, axis=1, keepdims=True) for v in vectors]
    return tuple(np.where(n > 1e-6, v / np.maximum(n, 1e-6), 0.0) for v, n in zip(vectors, length))


def _user_names(config, dataset) -> list[str] | None:
    file = Path(config["data_path"]) / f"{config['dataset']}.user"
    uid, column = dataset.uid_field, config["user_name_field"]
    if not file.is_file():
        return None
    table = read_columns([file], [uid, column], config["field_separator"])
    if column not in table or uid not in table:
        return None
    names = dict(zip(table[uid], table[column].str.strip()))
    return ["", *(names.get(token) or token for token in map(str, dataset.field2id_token[uid][1:]))]


def _titles(config, dataset) -> list[str] | None:
    content = ItemContent.from_config(config, dataset)
    if config["title_field"] not in content.fields:
        return None
    return [content.field(config["title_field"], item) for item in range(dataset.item_num)]
