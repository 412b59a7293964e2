"""The search over existing items: equal to scoring every item, to transformers' generate, and never inventing one."""

import pytest
import torch
from torch.testing import assert_close
from transformers import LogitsProcessorList

from recbole_mm.model.vip5.network import NetworkSettings, VIP5Network
from recbole_mm.model.vip5.search import Trie, TrieLogits, beam_search, score_items

# items of one to three tokens, one the beginning of another, ids with gaps
SEQUENCES = {2: [5], 3: [5, 6], 5: [5, 6, 7], 6: [8, 5], 7: [8, 9], 9: [9, 9, 9], 11: [7, 5, 6], 12: [7, 5, 8], 14: [6, 9, 5], 15: [6, 6]}
ITEMS = list(SEQUENCES)


def world(adapters: bool = True):
    torch.manual_seed(3)
    settings = NetworkSettings(
        vocab_size=12, d_model=16, d_ff=32, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2, n_vis_tokens=0,
        use_adapter=adapters, reduction_factor=4,
    )  # fmt: skip
    network = VIP5Network(settings).eval()
    trie = Trie(ITEMS, [[*tokens, 1] for tokens in SEQUENCES.values()])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    encoded = torch.randn(3, 4, 16) * 2
    return network, trie, encoded, mask


def brute_force(network, trie, encoded, mask, normalise):
    scores = score_items(network, encoded, mask, trie, torch.tensor([ITEMS] * len(encoded)), normalise)
    best, order = scores.sort(dim=1, descending=True)
    return torch.tensor(ITEMS)[order], best


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("normalise", ["trie", "vocabulary"])
def test_as_many_beams_as_the_widest_level_find_what_brute_force_finds(adapters, normalise):
    network, trie, encoded, mask = world(adapters)
    items, scores = beam_search(network, encoded, mask, trie, trie.widest, len(ITEMS), normalise=normalise)
    wanted, values = brute_force(network, trie, encoded, mask, normalise)
    assert items.tolist() == wanted.tolist()
    assert_close(scores, values, atol=1e-5, rtol=1e-5)


def test_trie_scores_are_a_distribution_over_the_items():
    network, trie, encoded, mask = world()
    _, scores = brute_force(network, trie, encoded, mask, "trie")
    assert_close(scores.exp().sum(1), torch.ones(3))


def test_few_beams_still_give_existing_items_once():
    network, trie, encoded, mask = world()
    items, scores = beam_search(network, encoded, mask, trie, 2, 4)
    for row, score in zip(items.tolist(), scores.tolist()):
        named = [i for i in row if i]
        assert len(set(named)) == len(named) and set(named) <= set(ITEMS)
        assert score == sorted(score, reverse=True)


def test_candidates_restrict_the_search_for_each_user():
    network, trie, encoded, mask = world()
    lists = torch.tensor([[2, 5, 9, 0], [3, 6, 7, 14], [15, 0, 0, 0]])
    items, scores = beam_search(network, encoded, mask, trie, 10, 4, lists)
    assert [sorted(i for i in row if i) for row in items.tolist()] == [[2, 5, 9], [3, 6, 7, 14], [15]]
    assert_close(scores.exp().sum(1), torch.ones(3))  # a distribution over the user's own list


@pytest.mark.parametrize("normalise", ["trie", "vocabulary"])
def test_generate_with_the_logits_processor_finds_the_same(normalise):
    network, trie, encoded, mask = world()
    out = network.generate(
        encoder_outputs=network.encoder_outputs(encoded), attention_mask=mask, num_beams=8, num_return_sequences=4, max_length=6,
        length_penalty=0.0, do_sample=False, early_stopping=False, return_dict_in_generate=True, output_scores=True,
        logits_processor=LogitsProcessorList([TrieLogits(trie, 1, normalise)]),
    )  # fmt: skip
    items, scores = beam_search(network, encoded, mask, trie, 8, 4, normalise=normalise)
    name = {tuple(tokens): item for item, tokens in SEQUENCES.items()}
    theirs = [name[tuple(t for t in row[1:] if t not in (0, 1))] for row in out.sequences.tolist()]
    assert theirs == items.flatten().tolist()
    assert_close(out.sequences_scores, scores.flatten(), atol=1e-5, rtol=1e-5)
