"""How far each planted signal of the shop reaches: rankings by the truth (oracles) and by none of it (blind baselines).

Nothing is learned from pictures or texts here: a ranking that is allowed to use a signal reads it from truth.npz, one that is not must do
without. Protocol: leave-one-out by time, all items as candidates, training and validation items of the user masked, test item ranked.

    python benchmarks/shop_oracles.py [--data dataset/shop] [--out benchmarks/quality]
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_mm.data.synthetic import ATTRIBUTES, NOVELTY, TEXTUAL, VISUAL, WEIGHTS
from recbole_mm.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = frozenset({"picture", "text", "order", "group", "own", "kind", "circle", "popularity", "novelty"})
RANKINGS = {
    "all signals": EVERYTHING,
    "all but pictures": EVERYTHING - {"picture"},
    "all but texts": EVERYTHING - {"text"},
    "all but order": EVERYTHING - {"order"},
    "all but the user's own value": EVERYTHING - {"own"},
    "all but the user's kinds": EVERYTHING - {"kind"},
    "all but the hidden circle": EVERYTHING - {"circle"},
    "content only, both": frozenset({"picture", "text", "group", "own", "kind"}),
    "content only, pictures": frozenset({"picture", "group", "own", "kind"}),
    "content only, texts": frozenset({"text", "group", "own", "kind"}),
    "order only, both": frozenset({"picture", "text", "group", "order"}),
    "groups shuffled among users": EVERYTHING | {"wrong group"},
    "popularity only": frozenset({"popularity"}),
    "random": frozenset(),
}


class Truth:
    """truth.npz and the split of a shop's interactions; users and items as row numbers of the truth."""

    def __init__(self, folder: Path):
        with np.load(folder / "truth.npz", allow_pickle=False) as file:
            for key in file.files:
                setattr(self, key, file[key].astype(np.int64) if file[key].dtype == np.int8 else file[key])
        table = pd.read_csv(folder / f"{folder.name}.inter", sep="\t", keep_default_na=False)
        table.columns = [c.split(":")[0] for c in table.columns]
        self.n_users, self.n_items = len(self.user_tokens), len(self.item_tokens)
        table["user"] = pd.Index(self.user_tokens).get_indexer(table["user_id"])
        table["item"] = pd.Index(self.item_tokens).get_indexer(table["item_id"])
        self.table = table.sort_values(["user", "timestamp"], kind="stable").reset_index(drop=True)
        rank = self.table.groupby("user").cumcount(ascending=False).to_numpy()
        self.is_test, self.is_valid, self.is_train = rank == 0, rank == 1, rank > 1
        user, item = self.table["user"].to_numpy(), self.table["item"].to_numpy()
        self.test_item, self.last_item = item[self.is_test], item[self.is_valid]
        self.history = np.zeros((self.n_users, self.n_items), bool)
        self.history[user[~self.is_test], item[~self.is_test]] = True
        self.train_count = np.bincount(item[self.is_train], minlength=self.n_items)
        self.unseen = self.train_count == 0


def scores(truth: Truth, signals: frozenset, rng: np.random.Generator) -> np.ndarray:
    """Utility [U, I] of what `signals` allows; the weights of synthetic.py."""
    everyone = np.arange(truth.n_users)
    group = rng.permutation(truth.group) if "wrong group" in signals else truth.group
    visible = {name for kind, names in (("picture", VISUAL), ("text", TEXTUAL)) if kind in signals for name in names}
    seen = np.array([name in visible for name in ATTRIBUTES])
    lead, second = truth.group_lead[group], truth.group_second[group]
    a, b = truth.attributes[:, lead].T, truth.attributes[:, second].T  # [U, I]
    total = np.zeros((truth.n_users, truth.n_items))
    if "group" in signals:
        liked = (a[..., None] == truth.favourites[group][:, None]).any(-1)
        total += seen[lead][:, None] * WEIGHTS["favourite"] * liked
        total += seen[second][:, None] * WEIGHTS["second"] * (b[..., None] == truth.seconds[group][:, None]).any(-1)
        for k in range(truth.group_others.shape[1]):
            column = truth.group_others[group, k]
            e = truth.attributes[:, column].T
            total += seen[column][:, None] * WEIGHTS["also"] * (e[..., None] == truth.also[group, k][:, None]).any(-1)
        if "own" in signals:
            total += seen[second][:, None] * WEIGHTS["own"] * (b == truth.own[:, None])
        if "order" in signals:
            wheel = np.full((len(truth.favourites), truth.attributes.max() + 1), -1)
            for g, values in enumerate(truth.favourites):
                wheel[g, values] = np.roll(values, -1)
            following = wheel[group, a[everyone, truth.last_item]]
            total += seen[lead][:, None] * WEIGHTS["order"] * (a == following[:, None])
    if "kind" in signals and {"picture", "text"} & signals:  # either shows it
        total += WEIGHTS["kind"] * (truth.kind[None, None] == truth.user_kinds[..., None]).any(1)
    if "circle" in signals:
        total += WEIGHTS["circle"] * (truth.circle[None] == truth.user_circle[:, None])
    if "popularity" in signals:
        total += np.log(truth.popularity) if "novelty" in signals else np.log1p(truth.train_count)
    if "novelty" in signals:
        total += NOVELTY * truth.cold
    return total + 1e-6 * rng.random(total.shape)  # ties fall at random


def measure(truth: Truth, total: np.ndarray, k: int = 20) -> dict[str, float]:
    """Recall and NDCG at k over all users, and recall of the users whose test item is unseen in training."""
    total = np.where(truth.history, -np.inf, total)
    everyone = np.arange(truth.n_users)
    rank = (total > total[everyone, truth.test_item][:, None]).sum(1)
    hit = rank < k
    gain = np.where(hit, 1 / np.log2(rank + 2), 0)
    unseen = truth.unseen[truth.test_item]

    def share(x: np.ndarray) -> float:
        return float(x.mean()) if len(x) else float("nan")

    return {f"recall@{k}": share(hit), f"ndcg@{k}": share(gain), "cold": share(hit[unseen]), "warm": share(hit[~unseen])}


def feature_words(truth: Truth) -> dict[str, float]:
    """Share of test reviews whose feature word is named right by what each reader can see."""
    test = truth.table[truth.is_test]
    word, user, item = test["feature_word"].to_numpy(str), test["user"].to_numpy(), test["item"].to_numpy()
    lead = truth.group_lead[truth.group[user]]
    right = truth.value_names[lead, truth.attributes[item, lead]]
    visual = lead < len(VISUAL)
    favourite = truth.value_names[lead, truth.favourites[truth.group[user], 0]]
    train = truth.table[truth.is_train]
    common = train["feature_word"].value_counts().index[0]
    per_user = train.groupby("user")["feature_word"].agg(lambda x: x.value_counts().index[0]).reindex(user).to_numpy(str)
    return {
        "group and content known": float((word == right).mean()),
        "group and text known, picture guessed": float((word == np.where(visual, favourite, right)).mean()),
        "group and picture known, text guessed": float((word == np.where(visual, right, favourite)).mean()),
        "the user's most frequent word": float((word == per_user).mean()),
        "the most frequent word": float((word == common).mean()),
        "share of words that only the picture shows": float(visual.mean()),
    }


def groups_from_histories(truth: Truth) -> dict[str, float]:
    """Adjusted Rand index of KMeans on the mean attributes of the training items, and on what only interactions show."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.metrics import adjusted_rand_score

    n_groups = len(truth.favourites)
    train = truth.table[truth.is_train]
    matrix = np.zeros((truth.n_users, truth.n_items), np.float32)
    matrix[train["user"], train["item"]] = 1
    one_hot = np.concatenate([np.eye(truth.attributes.max() + 1)[column] for column in truth.attributes.T], axis=1)
    profile = matrix @ one_hot / matrix.sum(1, keepdims=True)
    half = len(VISUAL) * (truth.attributes.max() + 1)
    views = {
        "pictures and texts": profile,
        "pictures": profile[:, :half],
        "texts": profile[:, half:],
        "interactions alone (SVD, 16)": TruncatedSVD(16, random_state=0).fit_transform(matrix),
        "shuffled users": np.random.default_rng(0).permutation(profile),
    }
    return {
        name: float(adjusted_rand_score(truth.group, KMeans(n_groups, n_init=10, random_state=0).fit_predict(view)))
        for name, view in views.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "dataset" / "shop")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "quality")
    args = parser.parse_args()
    truth = Truth(args.data)
    rows = {name: measure(truth, scores(truth, signals, np.random.default_rng(0))) for name, signals in RANKINGS.items()}
    words, groups = feature_words(truth), groups_from_histories(truth)
    counts = {
        "users": truth.n_users,
        "items": truth.n_items,
        "interactions": len(truth.table),
        "items without training interaction": int(truth.unseen.sum()),
        "test items without training interaction": float(truth.unseen[truth.test_item].mean()),
    }
    write_json(
        args.out / "shop_oracles.json",
        {
            "version": int(truth.version),
            "seed": int(truth.seed),
            "counts": counts,
            "rankings": rows,
            "feature_words": words,
            "groups": groups,
        },
    )
    columns = ["recall@20", "ndcg@20", "cold", "warm"]
    lines = [
        f"# The shop's planted signals (generator version {truth.version}, seed {truth.seed})",
        "",
        "Made by `python benchmarks/shop_oracles.py`. Rankings by the truth, no learning: the scale for every claim made on the shop.",
        "Leave-one-out by time, all items, history masked. `cold` and `warm`: Recall@20 where the test item has no / some training interaction.",
        "",
        ", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value:,}" for name, value in counts.items()) + ".",
        "",
        "| what the ranking may use | Recall@20 | NDCG@20 | cold | warm |",
        "|---|---|---|---|---|",
        *(f"| {name} | " + " | ".join(f"{row[c]:.4f}" for c in columns) + " |" for name, row in rows.items()),
        "",
        "| who names the feature word of a test review | right |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in words.items()),
        "",
        "| taste groups found by KMeans on users' training histories | adjusted Rand index |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in groups.items()),
        "",
    ]
    write_text(args.out / "shop_oracles.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
