"""Evaluation: RecBole's values on scores without ties, a fixed order on scores with ties, the same whatever the batch."""

import math

import numpy as np
import pytest
import torch
from recbole.data import create_dataset
from recbole.data.interaction import Interaction
from recbole.data.utils import data_preparation as recbole_preparation
from recbole.evaluator import Collector, Evaluator
from recbole.trainer import Trainer as RecBoleTrainer
from recbole.utils import init_seed

from recbole_mm.data.loader import data_preparation
from recbole_mm.errors import UserError
from recbole_mm.evaluator import full_sort
from recbole_mm.evaluator.full_sort import batch_rows, bytes_per_row, evaluate, top_k
from recbole_mm.evaluator.groups import popularity, popularity_bands, warm_items
from tests.data.small import small_config, write_small

TOP = ["Recall", "MRR", "NDCG", "Hit", "Precision", "MAP"]
OTHER = ["GAUC", "ItemCoverage", "AveragePopularity", "ShannonEntropy", "GiniIndex", "TailPercentage"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("data"))


class Table(torch.nn.Module):
    """Scores looked up in a table [users, items]; sequential rows are users too."""

    def __init__(self, scores: torch.Tensor, sequence: str | None = None):
        super().__init__()
        self.scores, self.sizes = scores, []
        self.sequence = sequence

    def full_sort_predict(self, interaction):
        self.sizes.append(len(interaction))
        rows = self.scores[interaction["user_id"]]
        if self.sequence is not None:
            rows = rows + 0.5 * (rows * (interaction[self.sequence].sum(1, keepdim=True) % 7)).sin()
        return rows.view(-1)

    def predict(self, interaction):
        return self.scores[interaction["user_id"], interaction["item_id"]]


class PairsOnly(Table):
    """A model without full_sort_predict."""

    def full_sort_predict(self, interaction):
        raise NotImplementedError


def prepared(folder, model="BPR", prepare=data_preparation, **settings):
    config = small_config(folder, model, **settings)
    init_seed(config["seed"], True)
    return config, prepare(config, create_dataset(config))


def table(dataset, seed=0) -> torch.Tensor:
    return torch.randn(dataset.user_num, dataset.item_num, generator=torch.Generator().manual_seed(seed))


def run(config, loader, model, **more):
    return evaluate(model, loader, config, Collector(config), Evaluator(config), **more)


class RecBoleCollector(Collector):
    """RecBole's, which calls ``.cpu()`` on the number of items and dies; here the numbers are put in after that."""

    def get_data_struct(self):
        facts = {k: v for k, v in self.data_struct._data_dict.items() if not isinstance(v, torch.Tensor)}
        for key in facts:
            del self.data_struct[key]
        struct = super().get_data_struct()
        for key, value in facts.items():
            struct.set(key, value)
        return struct


def recbole_run(config, train, loader, model):
    trainer = RecBoleTrainer.__new__(RecBoleTrainer)
    trainer.config, trainer.model, trainer.device = config, model, config["device"]
    trainer.eval_collector, trainer.evaluator = RecBoleCollector(config), Evaluator(config)
    trainer.eval_collector.data_collect(train)
    trainer.item_tensor = trainer.tot_item_num = None
    trainer.test_batch_size, trainer.gpu_available = config["eval_batch_size"], False
    trainer.wandblogger = type("Off", (), {"log_eval_metrics": lambda *a, **k: None})()
    return trainer.evaluate(loader, load_best_model=False)


@pytest.mark.parametrize("phase", [1, 2], ids=["valid", "test"])
@pytest.mark.parametrize("metric", TOP + OTHER)
def test_values_are_recboles(folder, metric, phase):
    config, ours = prepared(folder, metrics=[metric], metric_decimal_place=10)
    _, theirs = prepared(folder, prepare=recbole_preparation)
    model = Table(table(ours[0].dataset))
    result = run(config, ours[phase], model)
    assert result.metrics == recbole_run(config, theirs[0], theirs[phase], model)
    assert len(result.metrics) == (1 if metric == "GAUC" else 3)
    assert {k: round(v, 10) for k, v in result.raw.items()} == pytest.approx(dict(result.metrics), abs=1e-10)


@pytest.mark.parametrize("settings", [{}, {"eval_args": {"split": {"RS": [0.6, 0.2, 0.2]}}}], ids=["leave-one-out", "ratio"])
def test_values_are_recboles_for_sequential_models(folder, settings):
    if settings:
        settings["eval_args"] |= {"group_by": "user", "order": "TO", "mode": "full"}
    both = [
        prepared(folder, "SASRec", p, metrics=TOP + OTHER, train_neg_sample_args=None, **settings)
        for p in (data_preparation, recbole_preparation)
    ]
    (config, ours), (_, theirs) = both
    model = Table(table(ours[0].dataset), "item_id_list")
    for phase in (1, 2):
        assert run(config, ours[phase], model).metrics == recbole_run(config, theirs[0], theirs[phase], model)


@pytest.mark.parametrize("mode", ["uni20", "pop20"])
def test_values_are_recboles_with_sampled_candidates(folder, mode):
    args = {"split": {"RS": [0.6, 0.2, 0.2]}, "group_by": "user", "order": "RO", "mode": mode}
    config, ours = prepared(folder, eval_args=args, metrics=TOP + ["GAUC"])
    _, theirs = prepared(folder, prepare=recbole_preparation, eval_args=args)
    model = Table(table(ours[0].dataset))
    for phase in (1, 2):
        np.random.seed(1)
        mine = run(config, ours[phase], model)
        np.random.seed(1)
        assert mine.metrics == recbole_run(config, theirs[0], theirs[phase], model)
        assert mine.users == len(mine.per_user.users) == len(ours[phase].uid_list)


def test_values_are_recboles_with_labels(folder):
    args = {"split": {"RS": [0.6, 0.2, 0.2]}, "group_by": "user", "order": "RO", "mode": "labeled"}
    more = {"eval_args": args, "metrics": ["AUC", "LogLoss", "MAE", "RMSE"], "valid_metric": "AUC", "train_neg_sample_args": None}
    more |= {"load_col": {"inter": ["user_id", "item_id", "rating"]}, "threshold": {"rating": 3}, "MODEL_INPUT_TYPE": "POINTWISE"}
    config, ours = prepared(folder, "FM", **more)
    _, theirs = prepared(folder, "FM", recbole_preparation, **more)
    model = Table(table(ours[0].dataset).sigmoid())
    mine = run(config, ours[2], model)
    assert mine.metrics == recbole_run(config, theirs[0], theirs[2], model)
    assert mine.per_user is None and mine.groups == {}


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_recboles_full_sort_loader_is_taken_too(folder, model):
    more = {"train_neg_sample_args": None} if model == "SASRec" else {}
    config, ours = prepared(folder, model, metrics=TOP, **more)
    _, theirs = prepared(folder, model, recbole_preparation, **more)
    network = Table(table(ours[0].dataset))
    expected, got = run(config, ours[2], network), run(config, theirs[2], network)
    assert got.metrics == expected.metrics and got.per_user.targets_hash == expected.per_user.targets_hash


def test_a_model_that_only_predicts_pairs(folder):
    config, (train, _, test) = prepared(folder, eval_batch_size=100, metrics=TOP)
    scores = table(train.dataset)
    assert run(config, test, PairsOnly(scores)).metrics == run(config, test, Table(scores)).metrics


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_batch_size_changes_nothing(folder, monkeypatch, rows):
    """With scores of three values, every list is decided by the order among equals."""
    config, (train, _, test) = prepared(folder, metrics=TOP + OTHER)
    scores = table(train.dataset).round().clamp(-1, 1)
    expected = run(config, test, Table(scores))
    monkeypatch.setattr(full_sort, "batch_rows", lambda *a: rows)
    got = run(config, test, Table(scores))
    assert got.raw == expected.raw
    assert torch.equal(got._ranking.items, expected._ranking.items)


def reference(scores: torch.Tensor, k: int) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in scores.tolist()]


@pytest.mark.parametrize("width", [5, 12, 100, 700, 703])
@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("levels", [1, 2, 4, 1000])
def test_top_k_orders_equals_by_id(width, k, levels):
    """Widths below and above the folded search, with a remainder; one level is all equal, many hardly ever."""
    generator = torch.Generator().manual_seed(width + k)
    scores = torch.randint(levels, (40, width), generator=generator).float()
    scores[:, 0] = -math.inf
    scores[3] = -math.inf
    scores[4, 2:] = -math.inf
    if k <= width:
        assert top_k(scores, k).tolist() == reference(scores, k)


def test_top_k_of_distinct_scores():
    scores = torch.randn(50, 2003, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_k(scores, 20), scores.topk(20).indices)


@pytest.mark.parametrize("width", [20, 700])
def test_nan_is_never_ranked(width):
    scores = torch.randn(5, width)
    scores[3, width - 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        top_k(scores, 5)


def test_nan_names_user_and_remedy(folder):
    config, (train, _, test) = prepared(folder)
    scores = table(train.dataset)
    user = int(test.row_users[4])
    scores[user, 7] = math.nan
    with pytest.raises(UserError, match=f"Table gives NaN.*'{train.dataset.id2token('user_id', user)}'.*learning_rate"):
        run(config, test, Table(scores))


def test_more_places_than_items_is_an_error(folder):
    config, (train, _, test) = prepared(folder)
    config["topk"] = [500]
    with pytest.raises(UserError, match=f"500 places.*{train.dataset.item_num - 1} items"):
        run(config, test, Table(table(train.dataset)))


def test_eval_mask_decides_whether_a_validation_item_takes_a_place(folder):
    """A model that puts validation items first is right at validation; at test they are in the way only under eval_mask: train."""
    values = {}
    for mask in ("all", "train"):
        config, (train, valid, test) = prepared(folder, eval_mask=mask, metrics=["MRR"], topk=[10])
        scores = torch.zeros(train.dataset.user_num, train.dataset.item_num)
        scores[valid.dataset.inter_feat["user_id"], valid.dataset.inter_feat["item_id"]] = 2
        scores[test.dataset.inter_feat["user_id"], test.dataset.inter_feat["item_id"]] = 1
        values[mask] = run(config, test, Table(scores)).raw["mrr@10"], run(config, valid, Table(scores)).raw["mrr@10"]
    assert values["all"] == (1.0, 1.0)
    assert values["train"][1] == 1.0 and values["train"][0] < 0.6


class Cube(Table):
    """Makes [B, I, D] on its way to [B, I]."""

    def full_sort_predict(self, interaction):
        super().full_sort_predict(interaction)
        rows = self.scores[interaction["user_id"]]
        return (rows.unsqueeze(2) * torch.ones(100) / 100).sum(2)


def test_memory_of_a_row_is_measured(folder):
    config, (train, _, test) = prepared(folder)
    scores, items = table(train.dataset), train.dataset.item_num
    assert bytes_per_row(Table(scores), lambda n: test.rows(0, n), test.sample_size, items) == 4 * items
    assert bytes_per_row(Cube(scores), lambda n: test.rows(0, n), test.sample_size, items) == 400 * items
    assert bytes_per_row(PairsOnly(scores), lambda n: test.rows(0, n), test.sample_size, items) is None
    config["eval_memory_mb"] = 0.2
    assert run(config, test, cube := Cube(scores)).raw == pytest.approx(run(config, test, Table(scores)).raw)
    assert max(cube.sizes[2:]) <= 3 < max(cube.sizes[:2])  # after the two probes


def test_sparse_tensors_on_the_way_do_not_disturb_the_measurement(folder):
    class Graph(Table):
        def full_sort_predict(self, interaction):
            adjacency = torch.eye(len(self.scores)).to_sparse_coo().coalesce() * 1.0
            return super().full_sort_predict(interaction) + torch.sparse.mm(adjacency, self.scores)[interaction["user_id"]].view(-1)

    config, (train, _, test) = prepared(folder)
    model, items = Graph(table(train.dataset)), train.dataset.item_num
    assert bytes_per_row(model, lambda n: test.rows(0, n), test.sample_size, items) == 4 * items
    assert run(config, test, model).metrics == run(config, test, Table(table(train.dataset))).metrics


def test_probing_leaves_the_random_generators_alone(folder):
    class Noisy(Table):
        def full_sort_predict(self, interaction):
            np.random.rand(3)
            return super().full_sort_predict(interaction) + torch.rand(1)

    config, (train, _, test) = prepared(folder)
    model, states = Noisy(table(train.dataset)), (np.random.get_state()[1].copy(), torch.get_rng_state())
    bytes_per_row(model, lambda n: test.rows(0, n), test.sample_size, train.dataset.item_num)
    assert (np.random.get_state()[1] == states[0]).all() and torch.equal(torch.get_rng_state(), states[1])


def test_batches_are_bounded_by_memory_and_for_sequences_by_rows():
    config = {"eval_memory_mb": 100, "eval_batch_size": 300}
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert batch_rows(config, gpu, 40_000, 10_000, False) == 100 * 2**20 // 130_000
    assert batch_rows(config, gpu, 40_000, 10_000, True) == 300
    assert batch_rows(config, cpu, 40_000, 10_000, False) <= 700
    assert batch_rows(config, gpu, 10**12, 10_000, False) == 1


def test_a_broadcast_score_matrix_is_not_written_through(folder):
    class Popular(Table):
        def full_sort_predict(self, interaction):
            return self.scores[:1].expand(len(interaction), -1)

    config, (train, _, test) = prepared(folder, metrics=TOP)
    scores = table(train.dataset)
    same = scores[:1].repeat(len(scores), 1)
    assert run(config, test, Popular(scores.clone())).metrics == run(config, test, Table(same)).metrics


def test_half_precision_scores(folder):
    config, (train, _, test) = prepared(folder)
    scores = table(train.dataset)
    assert run(config, test, Table(scores.bfloat16())).users == test.sample_size


def test_per_user_values_are_named_and_average_to_the_metrics(folder):
    config, (train, _, test) = prepared(folder, metrics=TOP + ["GAUC", "AveragePopularity", "TailPercentage", "ItemCoverage"])
    result = run(config, test, Table(table(train.dataset)))
    per_user = result.per_user
    assert set(per_user.values) == set(result.raw) - {f"itemcoverage@{k}" for k in (1, 5, 10)}
    for name, values in per_user.values.items():
        assert values.shape == per_user.users.shape == (result.users,)
        if name != "gauc":  # weighted by the number of right items
            assert values.mean() == pytest.approx(result.raw[name])
    right = np.bincount(result._ranking.rows.numpy())
    assert (per_user.values["gauc"] * right).sum() / right.sum() == pytest.approx(result.raw["gauc"], abs=1e-6)
    assert per_user.users[0] == train.dataset.id2token("user_id", int(test.row_users[0]))


def test_per_user_file_needs_no_pickle(folder, tmp_path):
    config, (train, _, test) = prepared(folder)
    per_user = run(config, test, Table(table(train.dataset))).per_user
    np.savez(tmp_path / "per_user.npz", **per_user.arrays())
    with np.load(tmp_path / "per_user.npz", allow_pickle=False) as file:
        assert str(file["targets_hash"]) == per_user.targets_hash and file["users"].dtype.kind == "U"
        assert (file["recall@10"] == per_user.values["recall@10"]).all()


def test_targets_hash_is_of_the_targets_and_not_of_their_order(folder, tmp_path):
    """The same ready split with its lines turned round gives other ids and the same hash; one test item less gives another."""
    config, (train, valid, test) = prepared(folder)

    def split(name, reverse, drop=0):
        (tmp_path / name).mkdir()
        for part, loader in zip(("train", "valid", "test"), (train, valid, test)):
            feat = loader.dataset.inter_feat
            tokens = zip(*(loader.dataset.id2token(field, feat[field].numpy()) for field in ("user_id", "item_id")))
            lines = ["\t".join(pair) for pair in tokens][: len(feat) - (drop if part == "test" else 0)]
            text = "\n".join(["user_id:token\titem_id:token", *(lines[::-1] if reverse else lines)])
            (tmp_path / name / f"{name}.{part}.inter").write_text(text + "\n")
        settings = {"benchmark_filename": ["train", "valid", "test"], "load_col": {"inter": ["user_id", "item_id"]}, "name": name}
        other, loaders = prepared(tmp_path, **settings)
        return run(other, loaders[2], Table(table(loaders[0].dataset))).per_user.targets_hash

    expected = run(config, test, Table(table(train.dataset))).per_user.targets_hash
    assert split("same", False) == split("turned", True) == expected
    assert split("less", False, drop=1) != expected


def test_cold_and_warm_by_hand(folder):
    config, (train, _, test) = prepared(folder, metrics=["Recall", "NDCG"], topk=[5])
    items, feat = train.dataset.item_num, test.dataset.inter_feat
    cold = ~warm_items(train.dataset)
    assert cold[0] and set((~cold).nonzero().flatten().tolist()) == set(train.dataset.inter_feat["item_id"].tolist())
    positives = {u: set(feat["item_id"][feat["user_id"] == u].tolist()) for u in feat["user_id"].unique().tolist()}
    scores = torch.zeros(train.dataset.user_num, items) - torch.arange(items) / items
    scores[feat["user_id"], feat["item_id"]] = 1 + cold[feat["item_id"]].float()  # cold right items first, then warm ones
    result = run(config, test, Table(scores))
    groups = result.groups
    cold_users = {u: sum(bool(cold[i]) for i in p) for u, p in positives.items() if any(bool(cold[i]) for i in p)}
    warm_users = {u: sum(not cold[i] for i in p) for u, p in positives.items() if any(not cold[i] for i in p)}
    assert groups["cold"]["users"] == len(cold_users) > 0 and groups["cold"]["targets"] == sum(cold_users.values())
    assert groups["warm"]["users"] == len(warm_users) and groups["warm"]["targets"] == sum(warm_users.values())
    assert groups["cold"]["recall@5"] == pytest.approx(np.mean([min(5, n) / n for n in cold_users.values()]))
    expected = [min(max(5 - cold_users.get(u, 0), 0), n) / n for u, n in warm_users.items()]
    assert groups["warm"]["recall@5"] == pytest.approx(np.mean(expected))
    assert groups["cold"]["ndcg@5"] == pytest.approx(1.0)


def test_popularity_by_hand(folder):
    config, (train, _, test) = prepared(folder, metrics=["Recall"], topk=[5])
    counts = torch.bincount(train.dataset.inter_feat["item_id"], minlength=train.dataset.item_num)
    bands = popularity_bands(train.dataset)
    assert not torch.stack(list(bands.values())).sum(0).gt(1).any() and not any(bool(b[0]) for b in bands.values())
    total = int(counts.sum())
    for member in bands.values():
        assert int(counts[member].sum()) == pytest.approx(total / 3, abs=int(counts.max()))
    assert int(counts[bands["popular"]].min()) >= int(counts[bands["middling"]].max()) >= int(counts[bands["rare"]].max()) >= 1
    groups = run(config, test, Table(table(train.dataset))).groups
    assert sum(groups[name]["targets"] for name in bands) == groups["warm"]["targets"]


def test_popularity_of_a_sequential_dataset_counts_first_items(folder):
    last_out = {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}}
    _, (train, _, _) = prepared(folder, "SASRec", train_neg_sample_args=None, **last_out)
    _, (plain, _, _) = prepared(folder, **last_out)
    tokens = [dict(zip(d.id2token("item_id", range(1, d.item_num)), popularity(d)[1:].tolist())) for d in (train.dataset, plain.dataset)]
    assert tokens[0] == tokens[1]


def test_a_group_without_targets_has_no_values(folder):
    config, (train, _, test) = prepared(folder, metrics=["Recall"], topk=[5])
    test.train_dataset = test.dataset  # every right item is known
    groups = run(config, test, Table(table(train.dataset))).groups
    assert groups["cold"] == {"users": 0, "targets": 0} and groups["warm"]["users"] == test.sample_size


def test_items_of_training_sequences_are_warm(folder):
    _, (train, _, _) = prepared(folder, "SASRec", train_neg_sample_args=None)
    feat = train.dataset.inter_feat
    known = set(feat["item_id"].tolist()) | set(feat["item_id_list"].flatten().tolist())
    assert set(warm_items(train.dataset).nonzero().flatten().tolist()) == known - {0}
    assert known - {0} != set(feat["item_id"].tolist())


def test_processes_evaluate_their_share_and_agree(folder, monkeypatch):
    """Two processes one after the other: what each would send is recorded and handed to both."""
    config, (train, _, test) = prepared(folder, metrics=TOP + OTHER)
    model = Table(table(train.dataset))
    expected = run(config, test, model)
    sent: dict[int, list] = {0: [], 1: []}
    for attempt in ("record", "play"):
        for rank in (0, 1):
            monkeypatch.setattr(full_sort.distributed, "world", lambda rank=rank: (rank, 2))
            calls = iter(range(10**6))

            def gather_values(value, rank=rank, attempt=attempt, calls=calls):
                if attempt == "record":
                    sent[rank].append(value)
                    return [value]
                call = next(calls)
                return [sent[0][call], sent[1][call]]

            monkeypatch.setattr(full_sort.distributed, "gather_values", gather_values)
            monkeypatch.setattr(full_sort.distributed, "gather", lambda tensor, send=gather_values: torch.cat(send(tensor)))
            if attempt == "record":
                collector = Collector(config)
                collector.data_collect(train)
                evaluate(model, test, config, collector, Evaluator(config))
            else:
                result = run(config, test, model)
                assert result.raw == pytest.approx(expected.raw, abs=1e-12)
                assert torch.equal(result._ranking.rows, expected._ranking.rows)
                assert result.per_user.targets_hash == expected.per_user.targets_hash


def test_an_interaction_is_all_a_model_sees(folder):
    """Rows carry users' features for models that read them."""
    _, (_, _, test) = prepared(folder)
    assert isinstance(test.rows(0, 3), Interaction) and test.rows(0, 3).columns == ["user_id"]
