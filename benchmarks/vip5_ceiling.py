"""What pictures can add to the direct task on the shop: a choice model of a few weights that is told the truth about the pictures.

    python benchmarks/vip5_ceiling.py              # writes benchmarks/quality/vip5_ceiling.md

Every candidate of a list has a score from a factorisation of the training interactions, its popularity there, whether it is new (no training
interaction), and how often the user took its true colour, pattern, shape and kind (the naive Bayes log odds of the four). The weights of these are
fitted on the validation lists, which VIP5 is not, and measured on the same test lists as VIP5. It is no strict bound, but a reader of pictures
that must learn to read them, and the users' tastes with it, has less to go by.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recbole_mm.config import Config
from recbole_mm.data.synthetic import KINDS, N_VALUES, NOVELTY, VISUAL
from recbole_mm.files import write_text
from recbole_mm.model.vip5.dataset import factorise
from recbole_mm.model.vip5.samples import candidate_lists
from recbole_mm.quick_start import create_dataset

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ("factors 16", "factors 8", "popularity", "new")
PICTURES = (*NUMBERS, "picture", "picture of a new item")
SMOOTHING = 6.0  # interactions of an average user that a user's own counts are mixed with


def signals(config: Config, train) -> dict[str, np.ndarray]:
    """Score [U, I] of every signal."""
    users, items = train.inter_feat["user_id"].numpy(), train.inter_feat["item_id"].numpy()
    n_users, n_items = train.user_num, train.item_num
    count = np.bincount(items, minlength=n_items).astype(float)
    new = count == 0
    with np.load(Path(config["data_path"]) / "truth.npz", allow_pickle=False) as truth:
        row = {token: i for i, token in enumerate(truth["item_tokens"])}
        known = [row.get(token, -1) for token in train.field2id_token["item_id"]]
        seen = np.concatenate([truth["attributes"][known][:, : len(VISUAL)], truth["kind"][known][:, None]], 1)
    values = np.where(np.array(known)[:, None] >= 0, seen, -1)
    sizes = [N_VALUES] * len(VISUAL) + [len(KINDS)]
    shown = np.concatenate([values[:, [c]] == np.arange(n) for c, n in enumerate(sizes)], 1).astype(float)  # [I, 28]
    taken = np.zeros((n_users, shown.shape[1]))
    np.add.at(taken, users, shown[items])
    usual = count @ shown / count.sum()
    total = np.bincount(users, minlength=n_users)[:, None]
    taste = np.log((taken + SMOOTHING * usual) / (total + SMOOTHING) / usual) @ shown.T
    everyone = np.ones((n_users, 1))
    out = {"popularity": everyone * np.log1p(count), "new": everyone * new, "picture": taste, "picture of a new item": taste * new}
    for rank in (16, 8):
        left, right = factorise(users, items, n_users, n_items, rank, 1)
        out[f"factors {rank}"] = left @ right.T
    return out


def lists_of(part, train, scores: dict[str, np.ndarray], config) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Scores of each user's candidates, the place of the right one, and whether that is new."""
    users, targets = part.inter_feat["user_id"].numpy(), part.inter_feat["item_id"].numpy()
    lists = candidate_lists(train.whole_sequences, users, targets, train.item_num, config["candidates"], config["candidate_seed"])
    shown = {name: torch.from_numpy(np.take_along_axis(score[users], lists, 1)) for name, score in scores.items()}
    return shown, torch.from_numpy((lists == targets[:, None]).argmax(1)), torch.from_numpy(scores["new"][users, targets] > 0)


def measure(names: tuple[str, ...], valid, test, weigh: float) -> list[float]:
    """Hit@1 of all, new and known targets and NDCG@10 of the test lists; a new target of the validation lists weighs `weigh`."""
    table = torch.stack([valid[0][n] for n in names], -1)
    mean, spread = table.mean((0, 1)), table.std((0, 1))
    weights = torch.zeros(len(names), dtype=table.dtype, requires_grad=True)
    importance = torch.where(valid[2], weigh, 1.0).to(table.dtype)
    optimizer = torch.optim.LBFGS([weights], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.cross_entropy((table - mean) / spread @ weights, valid[1], reduction="none")
        loss = (importance * losses).sum() / importance.sum() + 1e-3 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    score = (torch.stack([test[0][n] for n in names], -1) - mean) / spread @ weights.detach()
    score = score + 1e-9 * torch.rand(score.shape, generator=torch.Generator().manual_seed(0))  # new items tie without pictures
    rank = (score > score.gather(1, test[1][:, None])).sum(1)
    first, gain = (rank == 0).double(), torch.where(rank < 10, 1 / torch.log2(rank + 2.0), 0.0)
    return [float(x.mean()) for x in (first, first[test[2]], first[~test[2]], gain)]


def main() -> None:
    """Fit, measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "quality")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = Config("VIP5", "shop", config_dict={"use_gpu": False, "state": "ERROR"})
    train, valid, test = create_dataset(config).build()
    scores = signals(config, train)
    valid, test = (lists_of(part, train, scores, config) for part in (valid, test))
    lines = [
        "# What pictures can add to the direct task on the shop", "",
        f"`python benchmarks/vip5_ceiling.py`; 1 + 99 candidates, test lists, {float(test[2].double().mean()):.3f} of the targets are new. What is fitted: see there.", "",
        "| a choice by | new items' larger share in later purchases | Hit@1 | new | known | NDCG@10 |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for told, weigh in (("unknown, as in training", float(np.exp(-NOVELTY))), ("known", 1.0)):
        for label, names in (("numbers", NUMBERS), ("numbers and true pictures", PICTURES)):
            lines.append(f"| {label} | {told} | " + " | ".join(f"{x:.3f}" for x in measure(names, valid, test, weigh)) + " |")
    page = "\n".join(lines) + "\n"
    write_text(options.out / "vip5_ceiling.md", page)
    print(page)


if __name__ == "__main__":
    main()
