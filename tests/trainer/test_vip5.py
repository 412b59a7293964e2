"""VIP5 from data to result: sampling, the three evaluations, protocols, resume, commands."""

import json

import numpy as np
import pytest
import torch

from recbole_mm.errors import UserError
from recbole_mm.explain import explain
from recbole_mm.explain import main as explain_main
from recbole_mm.model.vip5.samples import EpochLoader, candidate_lists
from recbole_mm.quick_start import load_model, run
from recbole_mm.recommend import recommend
from recbole_mm.trainer.vip5 import _Ranked
from tests.model.vip5_data import COLOURS, SMALL, build, write_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("vip5"))


def train(root, tmp_path, **settings):
    return run("VIP5", "tiny", config_dict={**SMALL, "data_path": str(root), "checkpoint_dir": str(tmp_path), **settings})


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    return train(root, tmp_path_factory.mktemp("run"), epochs=2, eval_prompts=["A-3", "A-9", "B-5", "C-3"])


def epoch(model, number=0, **changes):
    settings = type(model.sampling)(**{**vars(model.sampling), **changes})
    return EpochLoader(
        model.sequences, model.records, model.train_prompts, model.renderer, model.negative_pool, settings, number
    )  # fmt: skip


def test_one_run_reports_all_three_tasks_and_its_protocol(finished):
    record = json.loads((pytest.importorskip("pathlib").Path(finished["run_dir"]) / "result.json").read_text())
    assert {"sequential/ndcg@5", "sequential[A-9]/hit@1", "direct/hit@1", "explanation/bleu4", "explanation/bleu4_published"} <= set(
        record["test"]
    )
    protocol = record["extra"]["protocol"]
    assert protocol["item_numbers"] == "random" and protocol["published"] is False and protocol["search"].startswith("existing items")
    assert record["best_epoch"] is not None and record["status"] == "finished"


def test_a_resumed_run_ends_where_the_unbroken_one_ends(root, tmp_path):
    settings = {"epochs": 3, "tasks": ["sequential"], "checkpoint_seconds": 0, "network": SMALL["network"]}
    whole = train(root, tmp_path / "a", **settings)

    class Killed(Exception):
        pass

    def kill(number, score):
        if number == 1:
            raise Killed

    with pytest.raises(Killed):
        run("VIP5", "tiny", config_dict={**SMALL, "data_path": str(root), "checkpoint_dir": str(tmp_path / "b"), **settings}, callback=kill)
    again = run(resume=next((tmp_path / "b").iterdir()))
    assert [e["train_loss"] for e in again["record"]["epochs"]] == [e["train_loss"] for e in whole["record"]["epochs"]]
    assert again["test_result"] == whole["test_result"]


def test_the_loaded_run_recommends_existing_items_and_explains(finished, capsys):
    loaded = load_model(finished["run_dir"])
    table = recommend(loaded, ["u1", "u2"], 5)
    history = {f"i{i}" for i in ()} | {
        str(loaded.dataset.field2id_token["item_id"][i]) for i in loaded.model.sequences.of(loaded.dataset.field2token_id["user_id"]["u1"])
    }
    assert len(table) == 10 and not history & set(table[table["user"] == "u1"]["item"])
    assert all(isinstance(text, str) for text in explain(loaded, [("u1", "i3"), ("u2", "i0")], "C-6"))
    assert explain_main([f"--run={finished['run_dir']}", "--user=u1", "--item=i3"]) == 0
    assert capsys.readouterr().out
    with pytest.raises(UserError, match="Unknown item"):
        explain(loaded, [("u1", "nothing")])
    with pytest.raises(UserError, match="sequential"):
        explain(loaded, [("u1", "i3")], "A-3")


def test_full_sort_scores_are_the_probabilities_that_predict_gives(root):
    _, model, parts = build(root, beams=45)
    model.eval()
    rows = parts[2].inter_feat[:6]
    scores = model.full_sort_predict(rows).view(6, -1)
    predicted = model.predict(rows)
    torch.testing.assert_close(scores[torch.arange(6), rows["item_id"]], predicted.detach(), atol=1e-5, rtol=1e-5)


def test_the_release_s_evaluation_and_numbers(root, tmp_path):
    """Free beam search: nothing parsable after so little training, so every user is a miss, and none crashes."""
    result = train(root, tmp_path, published=True, epochs=1, sequential_samples=1, direct_samples=1)
    assert result["record"]["extra"]["protocol"]["search"].startswith("free text")
    assert result["record"]["extra"]["protocol"]["explanation_tokens"] == 20
    _, model, _ = build(root, published=True)
    own = np.concatenate([model.facts.item_number[model.sequences.of(u)] for u in np.argsort(model.facts.user_number)[1:]])
    first = own[np.sort(np.unique(own, return_index=True)[1])]
    assert first.tolist() == list(range(1, len(first) + 1))  # in order of appearance
    _, plain, _ = build(root)
    assert sorted(plain.facts.item_number) == sorted(model.facts.item_number)
    assert plain.facts.item_number.tolist() != model.facts.item_number.tolist()
    assert model.loss_weighting == "published"


def test_a_user_without_an_item_is_a_miss_even_if_the_list_must_be_filled():
    stand_in = _Ranked([(1,), (2,)], torch.tensor([3, 4]), np.array([[0, 0], [5, 4]]), 7, lambda rows: rows)
    scores = stand_in.full_sort_predict([(1,), (2,)]).view(2, 7)
    assert 3 not in scores[0].topk(6).indices.tolist()
    assert scores[1].topk(2).indices.tolist() == [5, 4]


def test_training_samples_stay_within_the_training_part(root):
    _, model, _ = build(root)
    loader = epoch(model, sequential=20, direct=20)
    train_items = {u: model.sequences.of(u)[: model.sequences.train[u]].tolist() for u in range(1, model.n_users)}
    lengths = set()
    for b in range(len(loader)):
        for prompt, slots in loader.samples(b):
            if prompt.task == "explanation":
                continue
            mine = train_items[slots.user]
            if prompt.kind in ("next", "choice") or slots.yes:
                assert slots.item in mine
            else:
                assert slots.item not in mine
            if prompt.task == "sequential":
                assert set(slots.items) <= set(mine)
                lengths.add(len(slots.items))
            if prompt.kind == "next":
                assert mine.index(slots.item) == mine.index(slots.items[-1]) + 1 >= len(mine) - 3
            if prompt.kind == "choice":
                assert len(set(slots.items)) == 10 and slots.item in slots.items
                assert not set(slots.items) & set(mine) - {slots.item}
    assert len(lengths) > 1


def test_an_epoch_is_the_same_whatever_the_number_of_workers(root):
    _, model, _ = build(root)
    plain = [batch.input_ids for batch in epoch(model)]
    workers = [batch.input_ids for batch in epoch(model, workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(plain, workers, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(plain, (b.input_ids for b in epoch(model, 1))))


def test_batches_of_similar_length_need_less_padding(root):
    _, model, _ = build(root, candidates=40)
    batches = list(epoch(model, sequential=10, direct=10))
    used = sum(int((b.input_ids != 0).sum()) for b in batches)
    assert used / sum(b.input_ids.numel() for b in batches) > 0.8


def test_candidate_lists_depend_on_seed_and_user_alone(root):
    _, model, _ = build(root)
    users, targets = [3, 5], [model.sequences.of(u)[-1] for u in (3, 5)]
    lists = candidate_lists(model.sequences, users, targets, model.n_items, 9, 2022)
    assert (candidate_lists(model.sequences, users[1:], targets[1:], model.n_items, 9, 2022) == lists[1:]).all()
    assert (candidate_lists(model.sequences, users, targets, model.n_items, 9, 1) != lists).any()
    for row, user, target in zip(lists, users, targets):
        assert target in row and not set(row) & set(model.sequences.of(user)) - {target}


def test_reviews_follow_their_interactions(root):
    _, model, _ = build(root)
    records = model.records
    for part in (0, 1, 2):
        rows = records.of(part)
        assert len(rows) == 30 * (6 if part == 0 else 1)
        for row in rows:
            sequence = model.sequences.of(int(records.user[row])).tolist()
            assert sequence.index(int(records.item[row])) in {0: range(6), 1: [6], 2: [7]}[part]
    assert set(records.feature) == set(COLOURS)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"topk": [5, 30], "valid_metric": "sequential/NDCG@5"}, "beams"),
        ({"fine_tuning": "self_attn"}, "language_model"),
        ({"valid_metric": "NDCG@5"}, "valid_metric"),
        ({"train_prompts": ["A-33"]}, "A-3"),
        ({"tasks": ["direkt"]}, "direkt"),
        ({"eval_prompts": ["A-7"]}, "yes or no"),
        ({"visual_modality": "smell", "visual_tokens": 1}, "smell"),
    ],
)
def test_wrong_settings_say_what_to_do(root, settings, match):
    with pytest.raises(UserError, match=match):
        build(root, **settings)


def test_valid_metric_must_belong_to_a_task_of_the_run(root, tmp_path):
    with pytest.raises(UserError, match="direct"):
        train(root, tmp_path, tasks=["sequential"], valid_metric="direct/Hit@1")


def test_stopping_by_the_loss(root, tmp_path):
    result = train(root, tmp_path, stop_on="loss", tasks=["sequential", "explanation"])
    assert result["record"]["epochs"][0]["valid"]["loss"] > 0


def test_fine_tuning_a_checkpoint_trains_adapters_only(root, tmp_path):
    """Two steps: a small T5 saved as official checkpoints are, then VIP5 on top of it."""
    _, model, _ = build(root)
    state = {n: v for n, v in model.network.state_dict().items() if "visual" not in n and "whole_word" not in n and "category" not in n}
    torch.save(state, tmp_path / "pytorch_model.bin")
    model.pieces.tokenizer.save(str(tmp_path / "tokenizer.json"))
    _, tuned, _ = build(root, language_model=str(tmp_path))
    trained = {n for n, p in tuned.network.named_parameters() if p.requires_grad}
    assert trained and all("adapter" in n or "norm" in n or "visual" in n for n in trained)
    assert any("enc_attn_adapter" in n for n in trained)
    assert torch.equal(tuned.network.shared.weight, model.network.shared.weight)
    _, less, _ = build(root, language_model=str(tmp_path), fine_tuning="self_attn")
    assert not any("enc_attn_adapter" in n for n, _ in less.network.named_parameters())
    assert all(p.requires_grad for p in build(root, language_model=str(tmp_path), fine_tuning="full")[1].network.parameters())
