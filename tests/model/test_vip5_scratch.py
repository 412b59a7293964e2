"""What lets a small VIP5 from scratch learn: where it starts, what it is asked, and what its answers compete with."""

import numpy as np
import pytest
import torch

from recbole_mm.errors import UserError
from recbole_mm.model.vip5.dataset import factorise
from recbole_mm.model.vip5.network import NetworkSettings, VIP5Network, per_token_loss
from recbole_mm.model.vip5.prompts import Slots
from recbole_mm.model.vip5.samples import EpochLoader, render
from tests.model.vip5_data import build, write_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("scratch"))


def epoch(model, **changes):
    settings = type(model.sampling)(**{**vars(model.sampling), **changes})
    return EpochLoader(model.sequences, model.records, model.train_prompts, model.renderer, model.negative_pool, settings, 0)


def test_every_training_item_can_be_a_target_where_asked(root):
    _, model, _ = build(root, tasks=["sequential"], train_prompts=["A-3"])
    places = {n: set(epoch(model, sequential=200, sequential_targets=n).stop.tolist()) for n in (1, 3, None)}
    assert places == {1: {5}, 3: {3, 4, 5}, None: {2, 3, 4, 5}}  # six training items a user, two before the first target


def test_the_number_of_explanation_samples(root):
    _, model, _ = build(root, tasks=["explanation"], train_prompts=["C-3"])
    rows = set(model.records.of(0).tolist())
    every, some = epoch(model).row.tolist(), epoch(model, explanation=2).row.tolist()
    assert sorted(every) == sorted(rows) and len(some) == len(set(some)) == 2 * 30 and set(some) < rows


def test_both_separators_are_pieces_of_the_trained_tokenizer(root):
    _, model, _ = build(root)
    for separator in (",", "->"):
        ids = model.pieces.ids(separator)
        assert len(ids) == 1 and model.pieces.text(ids) == separator


def test_the_copying_start_hands_embeddings_through_and_looks_at_the_next_token():
    settings = NetworkSettings(vocab_size=50, d_model=32, d_ff=16, d_kv=16, num_heads=2, num_layers=1, num_decoder_layers=2, use_adapter=False,
                               copying=True, embedding_std=0.5, feat_dim=3, n_vis_tokens=1)  # fmt: skip
    torch.manual_seed(0)
    network = VIP5Network(settings).eval()
    for block in network.decoder.block:
        attention = block.layer[1].EncDecAttention
        assert torch.allclose(attention.o.weight @ attention.v.weight, torch.eye(32), atol=1e-5)
    assert network.shared.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert not network.encoder.whole_word_embeddings.weight.any()
    attention = network.encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(6, 6)[0, 0]
    assert bias.argmax(1)[:-1].tolist() == [1, 2, 3, 4, 5]
    heads = attention.o.weight.view(32, 2, 16).pow(2).mean((0, 2)).sqrt()  # T5 starts them at (heads * d_kv) ** -0.5
    assert heads.tolist() == pytest.approx([0.2 * 32**-0.5] * 2, rel=0.2)  # what the head reads must not blur the token it stands on


def test_a_decoder_deeper_than_the_encoder_generates(root):
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 2}
    _, model, _ = build(root, network=sizes, gen_max_length=6)
    assert isinstance(model.explain([model.explanation_sample(model.all_prompts["C-3"], 1, 2)])[0], str)


def test_numbers_start_where_the_interactions_put_them(root):
    _, model, parts = build(root, collaborative_start=3, network={"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 1, "embedding_std": 0.5})  # fmt: skip
    inter = parts[0].inter_feat
    users, items = inter["user_id"].numpy(), inter["item_id"].numpy()
    left, right = factorise(users, items, model.n_users, model.n_items, 3, 0)
    taste = np.array([int(t[1:]) % 3 for t in parts[0].id2token("item_id", np.arange(1, model.n_items))])
    near = right[1:] @ right[1:].T
    same = taste[:, None] == taste
    seen = np.isin(np.arange(1, model.n_items), items)
    pairs = seen[:, None] & seen & ~np.eye(len(seen), dtype=bool)
    # with SciPy 1.15 and NumPy 2.2 different tastes are at 0.17, with later ones below 0.1
    assert near[same & pairs].mean() > 0.8 and near[~same & pairs].mean() < 0.3
    assert not right[0].any() and not left[0].any()
    rows = model.network.shared.weight[model._number_tokens(model.facts.item_number, np.arange(1, model.n_items))].detach().numpy()
    near = rows @ rows.T
    assert near[same & pairs].mean() > near[~same & pairs].mean() + 1
    with pytest.raises(UserError, match="number_tokens: whole"):
        build(root, collaborative_start=3, number_tokens="digits")


def test_users_can_be_left_out_of_the_start(root):
    _, model, _ = build(root, collaborative_start=3, collaborative_users=False)
    weight, numbers = model.network.shared.weight, model.facts
    assert not weight[model._number_tokens(numbers.user_number, np.arange(1, model.n_users))].any()
    assert weight[model._number_tokens(numbers.item_number, np.arange(1, model.n_items))].any(1).all()


def test_items_that_training_lacks_are_no_negatives(tmp_path):
    root = write_dataset(tmp_path, users=4)  # few users: some items are never sold in training
    _, model, parts = build(root, tasks=["sequential"], train_prompts=["A-3"], negative_items="train", visual_tokens=0)
    unseen = np.setdiff1d(np.arange(1, model.n_items), parts[0].inter_feat["item_id"].numpy())
    assert len(unseen)
    batch = render(model.renderer, epoch(model).samples(0))
    model.train()
    model.calculate_loss(batch).backward()
    gradient = model.network.shared.weight.grad
    rows = model._number_tokens(model.facts.item_number, np.arange(1, model.n_items))
    touched = gradient[rows].any(1).numpy()
    assert not touched[unseen - 1].any() and np.delete(touched, unseen - 1).all()
    model.zero_grad()
    model.eval()
    model.calculate_loss(batch).backward()  # a validation loss counts every token
    assert model.network.shared.weight.grad[rows].any(1).all()


def test_in_training_an_answer_costs_what_its_number_costs_among_the_items(tmp_path):
    root = write_dataset(tmp_path, users=4)
    _, model, parts = build(root, tasks=["sequential"], train_prompts=["A-3", "A-7"], negative_items="train", visual_tokens=0, dropout=0.0)  # fmt: skip
    batch = render(model.renderer, epoch(model).samples(0))
    first = batch.labels[:, 0]
    trained = np.unique(parts[0].inter_feat["item_id"].numpy())
    allowed = torch.from_numpy(np.sort(model._number_tokens(model.facts.item_number, trained)))
    named = torch.isin(first, allowed)
    assert named.any() and not named.all()  # A-7 is answered by yes or no
    model.train()
    logits = model.network.logits(*model.encode(batch), batch.labels)
    among = logits[:, 0].gather(1, first[:, None])[:, 0] - logits[:, 0, allowed].logsumexp(-1)
    words = per_token_loss(logits, batch.labels).sum(1) / (batch.labels != -100).sum(1)
    expected = torch.where(named, -among / 2, words).mean()  # the end mark behind a number is certain
    assert model.calculate_loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_shuffled_lists_keep_picture_and_answer_and_draw_numbers_of_others(tmp_path):
    root = write_dataset(tmp_path, users=4)
    _, model, _ = build(root, tasks=["direct"], train_prompts=["B-7"], negative_items="train", shuffled_numbers=0.6, visual_tokens=2, train_candidates=5)  # fmt: skip
    number = {int(n): i for i, n in enumerate(model.facts.item_number) if i}
    shuffled = total = 0
    for batch in range(len(loader := epoch(model, direct=30))):
        for prompt, slots in loader.samples(batch):
            packed = model.renderer.source(prompt, slots)
            pictures = ((packed >> 33)[packed >> 33 > 0] - 1) // 2
            assert pictures.reshape(-1, 2).T.tolist() == [slots.items.tolist()] * 2  # own pictures, in the order of the list
            answer = number[int(model.pieces.text(model.renderer.target(prompt, slots)))]
            total += 1
            if slots.shown_as is None:
                assert answer == slots.item
                continue
            shuffled += 1
            assert not set(slots.shown_as.tolist()) & set(slots.items.tolist())
            assert len(set(slots.shown_as.tolist())) == len(slots.items)
            assert slots.items[list(slots.shown_as).index(answer)] == slots.item
    assert total > 100 and 0.45 < shuffled / total < 0.75
    for other in ({"visual_tokens": 0}, {"published": True, "choice_softmax": "list"}):
        assert build(root, shuffled_numbers=0.6, **other)[1].sampling.shuffled_numbers == 0
    model.train()
    assert torch.isfinite(model.calculate_loss(render(model.renderer, loader.samples(0))))


@pytest.mark.parametrize("wrong", [{"choice_softmax": "list", "number_tokens": "digits"},
                                   {"shuffled_numbers": 1.5}, {"choice_softmax": "candidates"}, {"matching_start": 3, "number_tokens": "digits"}, {"matching_start": -1}])  # fmt: skip
def test_settings_from_scratch_that_cannot_be(root, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        build(root, **wrong)


def test_an_answer_to_a_list_can_compete_with_the_listed_items_only(root):
    _, model, _ = build(root, tasks=["direct"], train_prompts=["B-1", "B-7"], choice_softmax="list", train_candidates=5, visual_tokens=0, dropout=0.0)  # fmt: skip
    loader = epoch(model, direct=4)
    samples = [sample for batch in range(len(loader)) for sample in loader.samples(batch)]
    batch = render(model.renderer, samples)
    model.train()
    logits = model.network.logits(*model.encode(batch), batch.labels)
    words = per_token_loss(logits, batch.labels).sum(1) / (batch.labels != -100).sum(1)
    expected = words.clone()
    for row, (prompt, slots) in enumerate(samples):
        if prompt.kind == "choice":
            listed = torch.from_numpy(model._number_tokens(model.facts.item_number, slots.items))
            expected[row] = (logits[row, 0, listed].logsumexp(-1) - logits[row, 0, batch.labels[row, 0]]) / 2
    assert 0 < sum(prompt.kind == "choice" for prompt, _ in samples) < len(samples)  # B-1 is answered by yes or no
    assert model.calculate_loss(batch).item() == pytest.approx(expected.mean().item(), rel=1e-5)


MATCHING = {"network": {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 2, "embedding_std": 0.5, "copying": True},
            "matching_start": 3, "candidates": 9}  # fmt: skip


def right_choices(model, dataset, items, shuffled):
    """Share of lists of three, one item of each colour, in which a user gets the own colour; `shuffled` shows them under numbers of others."""
    colour = {field: np.array([-1, *(int(t[1:]) % 3 for t in dataset.id2token(field, np.arange(1, n)))])
              for field, n in (("item_id", model.n_items), ("user_id", model.n_users))}  # fmt: skip
    rng = np.random.default_rng(1)
    samples, lists, hits = [], [], []
    for user in np.repeat(np.arange(1, model.n_users), 8):
        row = rng.permutation([rng.choice(items[colour["item_id"][items] == c]) for c in range(3)])
        shown = rng.choice(np.setdiff1d(np.arange(1, model.n_items), row), 3, replace=False) if shuffled else row
        samples.append((model.all_prompts["B-7"], Slots(user=int(user), items=row, shown_as=shown)))
        lists.append(shown)
        hits.append(shown[colour["item_id"][row] == colour["user_id"][user]][0])
    return float((model.rank(samples, 1, lists)[0][:, 0] == hits).mean())


@pytest.mark.parametrize("mixed, low, high", [(False, 0.55, 1.0), (True, 0.0, 0.45)])
def test_the_matching_start_chooses_by_pictures_before_any_training(root, mixed, low, high):
    """Under numbers of other items only pictures tell; chance is a third, and what the pictures of any other items must give."""
    hits = []
    for seed in range(4):
        _, model, parts = build(root, seed=seed, tasks=["direct"], eval_prompts=["B-7"], visual_tokens=1, **MATCHING)
        table = next(iter(model.features.values()))
        if mixed:
            table[1:] = table[1:][torch.randperm(len(table) - 1, generator=torch.Generator().manual_seed(seed))]
        hits.append(right_choices(model, parts[0], np.arange(1, model.n_items), shuffled=True))
    assert low <= np.mean(hits) <= high, hits


def test_the_matching_start_without_pictures_compares_numbers(root):
    _, model, parts = build(root, tasks=["direct"], eval_prompts=["B-7"], visual_tokens=0, **MATCHING)
    assert right_choices(model, parts[0], np.unique(parts[0].inter_feat["item_id"].numpy()), shuffled=False) > 0.75


def test_the_matching_start_says_what_sizes_it_needs(root):
    with pytest.raises(
        UserError,
        match=r"matching_start: 3 needs network sizes d_kv > 3, d_model >= 15 and num_decoder_layers >= 2, got .* num_decoder_layers 1",
    ):
        build(root, matching_start=3)
