"""Recommendations of a finished run, as a table people and programs can read."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from tqdm import tqdm

from recbole_mm.data.content import ItemContent
from recbole_mm.errors import UserError
from recbole_mm.files import atomic_path
from recbole_mm.parsing import parse_options
from recbole_mm.quick_start import LoadedRun, load_model

_BATCH = 1024


def _parts(run: LoadedRun) -> list:
    return [loader._dataset for loader in (run.train_data, run.valid_data, run.test_data) if loader is not None]


def _histories(run: LoadedRun) -> tuple[np.ndarray, np.ndarray]:
    """All (user, item) pairs of the run's data: training, validation and test."""
    users, items = [], []
    for part in _parts(run):
        feat = part.inter_feat
        users.append(feat[part.uid_field].cpu().numpy())
        items.append(feat[part.iid_field].cpu().numpy())
        sequence = f"{part.iid_field}{run.config['LIST_SUFFIX']}"
        if sequence in feat.interaction:  # the first item of a sequence is never anybody's target
            columns = feat[sequence].cpu().numpy()
            users.append(np.repeat(users[-1], columns.shape[1]))
            items.append(columns.ravel())
    users, items = np.concatenate(users), np.concatenate(items)
    return users[items > 0], items[items > 0]


def _latest_sequences(run: LoadedRun, users: Sequence[int]) -> Interaction:
    """For each user the interaction that predicts what comes after everything known, one row per user."""
    own = getattr(run.train_data._dataset, "latest_sequences", None)
    if own is not None:
        return own(users)
    config = run.config
    length_field, limit = config["ITEM_LIST_LENGTH_FIELD"], config["MAX_ITEM_LIST_LENGTH"]
    iid = run.dataset.iid_field
    newest: dict[int, tuple[int, int, int]] = {}
    parts = _parts(run)
    for number, part in enumerate(parts):  # later parts, and in a part longer sequences, are later in time
        uid = part.inter_feat[part.uid_field].tolist()
        length = part.inter_feat[length_field].tolist()
        for row, (user, size) in enumerate(zip(uid, length)):
            if user not in newest or (number, size) >= newest[user][:2]:
                newest[user] = (number, size, row)
    rows = []
    for user in users:
        if user not in newest:
            raise UserError(
                f"The user {run.dataset.field2id_token[run.dataset.uid_field][user]!r} has too short a history for {config['model']}."
            )
        number, size, row = newest[user]
        part = parts[number]
        single = {name: column[row : row + 1].clone() for name, column in part.inter_feat.interaction.items()}
        for name in list(single):
            target = name[: -len(config["LIST_SUFFIX"])] if name.endswith(config["LIST_SUFFIX"]) else None
            if target not in single:
                continue
            kept = torch.cat([single[name][0, :size], single[target]])[-limit:]
            single[name] = torch.zeros_like(single[name])
            single[name][0, : len(kept)] = kept
            if target == iid:
                single[length_field] = torch.tensor([len(kept)])
        rows.append(single)
    return Interaction({name: torch.cat([row[name] for row in rows]) for name in rows[0]})


@torch.no_grad()
def recommend(
    run: LoadedRun | str | Path, users: Iterable[str] | None = None, topk: int = 10, exclude_history: bool = True
) -> pd.DataFrame:
    """The `topk` best items of each user under the run's best weights.

    Args:
        run: a run directory or a loaded run.
        users: user tokens; None for every user of the dataset.
        topk: list length; a user with fewer candidates gets a shorter list.
        exclude_history: leave out everything the user has interacted with, in training, validation and test.

    Returns:
        one row per recommendation: ``user``, ``rank`` (from 1), ``item``, ``title`` (empty where there is none), ``score``. Equal scores
        are ordered by item id.

    Raises:
        UserError: for an unknown user, or a model whose scores need more than a user and a history.
    """
    run = run if isinstance(run, LoadedRun) else load_model(run)
    own = getattr(run.model, "recommend", None)
    dataset, config = run.dataset, run.config
    if topk < 1:
        raise UserError(f"topk: expected a number of at least 1, got {topk}.")
    tokens = dataset.field2id_token[dataset.uid_field]
    if users is None:
        ids = list(range(1, dataset.user_num))
    else:
        known = {str(token): number for number, token in enumerate(tokens) if number > 0}
        users = [str(user) for user in users]
        missing = [user for user in users if user not in known]
        if missing:
            raise UserError(
                f"Unknown user {missing[0]!r} ({len(missing)} of {len(users)}): not in {config['dataset']}. Users are named as in its .inter file, e.g. {tokens[1]!r}."
            )
        ids = [known[user] for user in users]
    content = ItemContent.from_config(config, dataset)
    item_tokens = dataset.field2id_token[dataset.iid_field]
    if own is not None:  # a generative model searches instead of scoring everything
        lists = own(run, ids, topk, exclude_history)
    else:
        lists = _scored(run, ids, topk, exclude_history)
    rows: list[dict[str, Any]] = []
    for user, chosen in zip(ids, lists):
        for rank, (item, score) in enumerate(chosen, start=1):
            rows.append(
                {"user": str(tokens[user]), "rank": rank, "item": str(item_tokens[item]), "title": content.title(item), "score": score}
            )
    return pd.DataFrame(rows, columns=["user", "rank", "item", "title", "score"])


def _scored(run: LoadedRun, ids: list[int], topk: int, exclude_history: bool) -> list[list[tuple[int, float]]]:
    dataset, model, config = run.dataset, run.model, run.config
    n_items = dataset.item_num
    if config["MODEL_TYPE"] not in (ModelType.GENERAL, ModelType.TRADITIONAL, ModelType.SEQUENTIAL):
        raise UserError(f"recommend serves general and sequential models; {config['model']} needs more context than a user.")
    seen_user, seen_item = _histories(run) if exclude_history else (np.zeros(0, int), np.zeros(0, int))
    order = np.argsort(seen_user, kind="stable")
    seen_user, seen_item = seen_user[order], seen_item[order]
    lists = []
    for begin in tqdm(range(0, len(ids), _BATCH), desc="Recommend", ncols=100, delay=2, leave=False):
        batch = ids[begin : begin + _BATCH]
        if config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            interaction = _latest_sequences(run, batch)
        else:
            interaction = Interaction({dataset.uid_field: torch.tensor(batch)})
            if dataset.user_feat is not None:
                interaction = dataset.join(interaction)
        interaction = interaction.to(config["device"])
        try:
            scores = model.full_sort_predict(interaction).view(len(batch), n_items).float().cpu()
        except NotImplementedError:
            every = torch.arange(n_items, device=config["device"])
            scores = torch.stack([
                model.predict(interaction[i : i + 1].repeat_interleave(n_items).update(Interaction({dataset.iid_field: every}))) for i in range(len(batch))
            ]).float().cpu()  # fmt: skip
        scores[:, 0] = -torch.inf
        low, high = np.searchsorted(seen_user, batch, "left"), np.searchsorted(seen_user, batch, "right")
        for row in range(len(batch)):
            scores[row, seen_item[low[row] : high[row]]] = -torch.inf
        values, items = torch.sort(scores, dim=-1, descending=True, stable=True)
        for row in range(len(batch)):
            kept = torch.isfinite(values[row, :topk])
            lists.append(list(zip(items[row, :topk][kept].tolist(), values[row, :topk][kept].tolist())))
    return lists


def main(arguments: list[str]) -> int:
    """``recbole-mm recommend --run=<run directory> [--users=a,b | --users=file.txt] [--topk=10] [--out=file.csv|.parquet] [--exclude_history=true]``."""
    options = parse_options(
        arguments, {"run": "", "users": None, "topk": 10, "out": "", "exclude_history": True}, "recommend", required=("run",)
    )
    users = options["users"]
    if isinstance(users, str) and Path(users).is_file():
        users = [line.strip() for line in Path(users).read_text(encoding="utf-8").splitlines() if line.strip()]
    elif users is not None:
        users = users.split(",") if isinstance(users, str) else users if isinstance(users, list) else [users]
    out = Path(options["out"]) if options["out"] else None
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise UserError(f"--out: expected a file ending in .csv or .parquet, got {out}.")
    table = recommend(options["run"], users, options["topk"], options["exclude_history"])
    if out is None:
        print(table.to_csv(index=False), end="")
        return 0
    with atomic_path(out) as temporary:
        if out.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
    print(f"{len(table)} recommendations for {table['user'].nunique()} users written to {out}.")
    return 0
