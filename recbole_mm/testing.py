"""Tests that a model should pass, for us and for anybody who adds one.

* :class:`TwoTastes`, :func:`fit` and :func:`auc`: a world with a known answer, where item features are the only clue about unseen items.
* :data:`CONTRACT`: checks of what a general model promises; ``for check in CONTRACT: check(MyModel)``.
* :func:`array_dataset` and :func:`make_model`: a model on arrays, without files.

Shapes: U users, I items, both with the padding row 0; P interactions; F_m width of modality m.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType, InputType
from torch import Tensor

from recbole_mm import checkpoint
from recbole_mm.config import Config
from recbole_mm.model import get_model


def test_config(model: str | type, arguments: list[str] | None = None, **settings: Any) -> Config:
    """Settings of `model` with its property file and `settings`, for a dataset called ``arrays`` that has no files."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "arrays").mkdir()
        given = {"use_gpu": False, "show_progress": False, "tensorboard": False, "data_path": folder, **settings}
        return Config(model, "arrays", config_dict=given, arguments=arguments)


test_config.__test__ = False  # not a test, although pytest would take it for one by its name


class ArrayDataset(Dataset):
    """A RecBole dataset from arrays: ids are taken as they are (1-based, 0 is padding), nothing is read, filtered or split.

    Args:
        config: the run's settings.
        interactions: pairs (user id, item id), int [P, 2].
        n_users, n_items: table sizes U and I, padding included.
        features: modality -> [I, F_m].
    """

    def __init__(self, config, interactions: np.ndarray, n_users: int, n_items: int, features: Mapping[str, Any] | None = None):
        self.config, self.dataset_name, self.dataset_path = config, config["dataset"], config["data_path"]
        self.uid_field, self.iid_field = config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]
        self.label_field, self.time_field = config["LABEL_FIELD"], config["TIME_FIELD"]
        self.field2type = {self.uid_field: FeatureType.TOKEN, self.iid_field: FeatureType.TOKEN}
        self.field2source = {self.uid_field: FeatureSource.USER_ID, self.iid_field: FeatureSource.ITEM_ID}
        self.field2seqlen = {self.uid_field: 1, self.iid_field: 1}
        self.field2id_token = {
            self.uid_field: np.array(["[PAD]", *map(str, range(1, n_users))]),
            self.iid_field: np.array(["[PAD]", *map(str, range(1, n_items))]),
        }
        self.field2token_id = {field: {token: i for i, token in enumerate(tokens)} for field, tokens in self.field2id_token.items()}
        pairs = torch.as_tensor(np.asarray(interactions), dtype=torch.long)
        self.inter_feat = Interaction({self.uid_field: pairs[:, 0], self.iid_field: pairs[:, 1]})
        self.user_feat = self.item_feat = None
        self.features = {name: torch.as_tensor(np.asarray(table), dtype=torch.float32) for name, table in (features or {}).items()}


def array_dataset(config, interactions, n_users: int, n_items: int, features: Mapping[str, Any] | None = None) -> ArrayDataset:
    """See :class:`ArrayDataset`."""
    return ArrayDataset(config, interactions, n_users, n_items, features)


def make_model(model: str | type, interactions, n_users: int, n_items: int, features: Mapping[str, Any], seed: int = 0, **settings: Any):
    """Build `model` on arrays (see :class:`ArrayDataset`), with its property file's settings changed by `settings`."""
    config = test_config(model, **settings)
    dataset = array_dataset(config, interactions, n_users, n_items, features)
    torch.manual_seed(seed)
    model_class = get_model(model) if isinstance(model, str) else model
    return model_class(config, dataset)


class TwoTastes:
    """Two groups of users with opposite tastes, items never seen in training, and features as the only clue about those.

    Args:
        shift: move the feature rows by so many places; 1 is the classic padding bug, after which unseen items can only be guessed.
        modalities: names of the feature tables, each carrying the same clue.
        n_users, n_seen, n_unseen, width, seed: sizes and seed of the world.
    """

    def __init__(self, shift: int = 0, modalities=("visual", "textual"), n_users=40, n_seen=60, n_unseen=40, width=8, seed=0):
        draw = np.random.default_rng(seed)
        self.n_users, self.n_items = n_users + 1, n_seen + n_unseen + 1
        self.users = np.arange(1, self.n_users)
        self.unseen = np.arange(n_seen + 1, self.n_items)
        self.taste = np.concatenate([[-1], draw.permutation(np.arange(n_seen + n_unseen) % 2)])  # no pattern that survives a shift
        pairs = []
        for user in self.users:
            liked = np.flatnonzero(self.taste[: n_seen + 1] == user % 2)
            pairs += [(user, item) for item in draw.choice(liked, size=12, replace=False)]
        self.interactions = np.array(pairs)
        self.features = {}
        for name in modalities:
            table = draw.normal(0, 0.3, (self.n_items, width))
            table[:, 0] += self.taste * 2 - 1
            table[:, 1] -= self.taste * 2 - 1
            table[1:] = np.roll(table[1:], shift, axis=0)
            table[0] = 0
            self.features[name] = table.astype(np.float32)

    @property
    def likes(self) -> np.ndarray:
        """Which unseen items each user likes, bool [users, unseen]."""
        return self.taste[self.unseen] == self.users[:, None] % 2

    def model(self, model: str | type, seed: int = 0, modalities=None, **settings: Any):
        """Build `model` on this world, with all its modalities or only some."""
        features = {name: table for name, table in self.features.items() if modalities is None or name in modalities}
        return make_model(model, self.interactions, self.n_users, self.n_items, features, seed, **settings)

    def batch(self, model, rows: np.ndarray | None = None, seed: int = 0) -> Interaction:
        """A training batch: the given rows of the interactions, or all, with a negative for each where the model wants one."""
        draw = np.random.default_rng(seed)
        pairs = self.interactions if rows is None else self.interactions[rows]
        columns = {model.USER_ID: torch.from_numpy(pairs[:, 0].copy()), model.ITEM_ID: torch.from_numpy(pairs[:, 1].copy())}
        if model.input_type == InputType.PAIRWISE:
            seen = len(self.taste) - len(self.unseen)
            opposite = [draw.choice(np.flatnonzero(self.taste[:seen] == 1 - user % 2)) for user in pairs[:, 0]]
            columns[model.NEG_ITEM_ID] = torch.tensor(opposite)
        return Interaction(columns)


def total_loss(losses: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A model's loss as one scalar; RecBole's models may return several parts."""
    return sum(losses) if isinstance(losses, tuple) else losses


def fit(
    model,
    world: TwoTastes,
    steps: int = 100,
    seed: int = 0,
    learning_rate: float = 0.01,
    batch_size: int = 256,
    weight_decay=0.0,
    **settings,
):
    """Train `model` (a name or class) on `world` with plain Adam for `steps` batches, and return it in evaluation mode."""
    model = world.model(model, seed, **settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    draw = np.random.default_rng(seed)
    torch.manual_seed(seed)
    per_epoch = max(len(world.interactions) // batch_size, 1)
    for step in range(steps):
        model.train()
        if step % per_epoch == 0 and hasattr(model, "before_epoch"):
            model.before_epoch(step // per_epoch)
        rows = draw.integers(0, len(world.interactions), size=batch_size)
        optimizer.zero_grad()
        total_loss(model.calculate_loss(world.batch(model, rows, seed=step))).backward()
        optimizer.step()
    return model.eval()


def scores(model, users: np.ndarray) -> np.ndarray:
    """Scores of `users` with every item, [users, I]."""
    with torch.no_grad():
        flat = model.full_sort_predict(Interaction({model.USER_ID: torch.as_tensor(users)}))
    return flat.view(len(users), -1).cpu().numpy()


def auc(model, users: np.ndarray, items: np.ndarray, likes: np.ndarray) -> float:
    """Mean over users of the chance that a liked item scores above one that is not; 0.5 is guessing.

    Args:
        users, items: ids to judge.
        likes: bool [users, items].
    """
    table = scores(model, users)[:, items]
    values = []
    for row, liked in zip(table, likes):
        difference = row[liked][:, None] - row[~liked][None, :]
        values.append((difference > 0).mean() + 0.5 * (difference == 0).mean())
    return float(np.mean(values))


# The contract: what every general model promises. Each check builds what it needs and raises AssertionError.


def check_loss_is_a_finite_scalar(model, **settings) -> None:
    world = TwoTastes()
    built = world.model(model, **settings).train()
    _begin_epoch(built)
    loss = total_loss(built.calculate_loss(world.batch(built)))
    assert loss.dim() == 0, f"loss has shape {tuple(loss.shape)}, expected a scalar"
    assert torch.isfinite(loss), f"loss is {loss.item()}"


def check_every_parameter_learns(model, **settings) -> None:
    """Each trainable parameter gets a gradient and is changed by one step."""
    world = TwoTastes()
    built = world.model(model, **settings).train()
    before = {name: p.detach().clone() for name, p in built.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(built.parameters(), lr=1.0)
    _begin_epoch(built)
    total_loss(built.calculate_loss(world.batch(built))).backward()
    silent = [name for name, p in built.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent, f"no gradient reaches {silent}"
    optimizer.step()
    fixed = set(getattr(built, "parameters_without_gradient", ()))  # e.g. a bias that a softmax cancels
    still = [name for name, p in built.named_parameters() if name in before and name not in fixed and torch.equal(p.detach(), before[name])]
    assert not still, f"one step does not change {still}"


def check_evaluation_changes_nothing(model, **settings) -> None:
    world = TwoTastes()
    built = world.model(model, **settings).eval()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    first = scores(built, world.users)
    assert np.array_equal(first, scores(built, world.users)), "two evaluations differ"
    after = built.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "evaluation changed the weights"


def check_predict_equals_full_sort(model, **settings) -> None:
    world = TwoTastes()
    built = world.model(model, **settings).eval()
    table = scores(built, world.users)
    assert table.shape == (len(world.users), world.n_items) and np.isfinite(table).all()
    users, items = torch.from_numpy(world.interactions[:50, 0]), torch.from_numpy(world.interactions[:50, 1])
    with torch.no_grad():
        single = built.predict(Interaction({built.USER_ID: users, built.ITEM_ID: items})).cpu().numpy()
    np.testing.assert_allclose(single, table[users - 1, items], rtol=1e-4, atol=1e-5)


def check_scores_follow_the_weights(model, **settings) -> None:
    """Scores after a step are those of the new weights, not of a cache."""
    world = TwoTastes()
    built = world.model(model, **settings).eval()
    before = scores(built, world.users)
    built.train()
    optimizer = torch.optim.SGD(built.parameters(), lr=0.5)
    _begin_epoch(built)
    total_loss(built.calculate_loss(world.batch(built))).backward()
    optimizer.step()
    built.eval()
    assert not np.allclose(before, scores(built, world.users)), "scores are older than the weights"


def check_same_seed_same_loss(model, **settings) -> None:
    world = TwoTastes()
    values = []
    for _ in range(2):
        built = world.model(model, seed=3, **settings).train()
        torch.manual_seed(5)
        _begin_epoch(built)
        values.append(total_loss(built.calculate_loss(world.batch(built))).item())
    assert values[0] == values[1], f"losses of one seed differ: {values}"


def check_checkpoint_restores_scores(model, **settings) -> None:
    """A model of another seed gives the saved model's scores after loading; what is saved is tensors and plain values."""
    world = TwoTastes()
    saved = fit(model, world, steps=3, **settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        checkpoint.save(path, {"state_dict": saved.state_dict(), "other_parameter": saved.other_parameter()})
        other = world.model(model, seed=9, **settings)
        checkpoint.load_weights(other, checkpoint.load(path), path)
    np.testing.assert_allclose(scores(other.eval(), world.users), scores(saved, world.users), rtol=1e-5, atol=1e-6)


def check_any_modalities(model, **settings) -> None:
    """One modality, two, and five with names nobody has heard of."""
    names = ("visual", "textual", "acoustic", "smell", "taste.of.it")
    world = TwoTastes(modalities=names)
    for chosen in (names[:1], names[1:2], names[3:4], names[:2], names):
        built = world.model(model, modalities=chosen, **settings).train()
        _begin_epoch(built)
        loss = total_loss(built.calculate_loss(world.batch(built)))
        loss.backward()
        assert torch.isfinite(loss), f"loss is {loss.item()} with {chosen}"
        assert np.isfinite(scores(built.eval(), world.users)).all()


def check_odd_features(model, **settings) -> None:
    """Rows of zeros, equal rows and items nobody has touched give no NaN."""
    world = TwoTastes()
    for table in world.features.values():
        table[5:9] = 0
        table[20:30] = table[20]
    built = world.model(model, **settings).train()
    _begin_epoch(built)
    loss = total_loss(built.calculate_loss(world.batch(built)))
    loss.backward()
    assert torch.isfinite(loss)
    bad = [name for name, p in built.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    assert not bad, f"gradients of {bad} are not finite"
    assert np.isfinite(scores(built.eval(), world.users)).all()


def _begin_epoch(model) -> None:
    if hasattr(model, "before_epoch"):
        model.before_epoch(0)


#: every check of the contract
CONTRACT: tuple[Callable[..., None], ...] = (
    check_loss_is_a_finite_scalar,
    check_every_parameter_learns,
    check_evaluation_changes_nothing,
    check_predict_equals_full_sort,
    check_scores_follow_the_weights,
    check_same_seed_same_loss,
    check_checkpoint_restores_scores,
    check_any_modalities,
    check_odd_features,
)
