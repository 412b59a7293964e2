"""VIP5's arithmetic against the official model's numbers."""

import copy
import json

import pytest
import torch
from torch.testing import assert_close

from recbole_mm.errors import UserError
from recbole_mm.model.vip5.network import (
    NetworkSettings,
    VIP5Network,
    per_token_loss,
    settings_of_checkpoint,
    training_loss,
)
from tests.support import golden_params, load_golden


class Golden:
    """A golden file and our network with its weights."""

    def __init__(self, path):
        data = load_golden(path)
        self.config = json.loads(str(data["config"]))
        self.data = {key: torch.from_numpy(value) for key, value in data.items() if key != "config"}
        self.state = {key[2:]: value for key, value in self.data.items() if key.startswith("w/")}
        self.network = VIP5Network(NetworkSettings.from_mapping(self.config)).eval()
        self.missing = self.network.load_official({f"module.{key}": value for key, value in self.state.items()})

    def __getitem__(self, key):
        return self.data[key]

    def encode(self):
        net, k = self.network, self.config["n_vis_tokens"]
        category = self["in/category_ids"]
        per_row = self["in/vis_feats"].shape[1] * k
        index = category.cumsum(1) - 1 + torch.arange(len(category))[:, None] * per_row
        visual = net.visual_tokens(self["in/vis_feats"].flatten(0, 1))
        embeds = net.embed(self["in/input_ids"], self["in/whole_word_ids"], visual, torch.where(category == 1, index, -1))
        mask = (self["in/input_ids"] != 0).long()
        return visual, embeds, net.encode(embeds, mask), mask


@pytest.mark.parametrize("path", golden_params("vip5"))
def test_golden_forward(path):
    golden = Golden(path)
    assert golden.missing == []
    with torch.no_grad():
        visual, embeds, encoded, mask = golden.encode()
        logits = golden.network.logits(encoded, mask, golden["in/labels"])
        losses = per_token_loss(logits, golden["in/labels"])
    assert_close(visual.view(golden["out/vis_embeds"].shape), golden["out/vis_embeds"], atol=1e-5, rtol=1e-5)
    assert_close(embeds, golden["out/encoder_inputs_embeds"], atol=1e-5, rtol=1e-5)
    assert_close(encoded, golden["out/encoder_last_hidden_state"], atol=1e-5, rtol=1e-5)
    assert_close(logits, golden["out/logits"], atol=1e-5, rtol=1e-5)
    assert_close(losses, golden["out/token_loss"], atol=1e-5, rtol=1e-5)
    assert_close(training_loss(losses, golden["in/labels"], "published"), golden["out/train_loss"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", golden_params("vip5"))
def test_golden_gradients(path):
    golden = Golden(path)
    _, _, encoded, mask = golden.encode()
    losses = per_token_loss(golden.network.logits(encoded, mask, golden["in/labels"]), golden["in/labels"])
    training_loss(losses, golden["in/labels"], "published").backward()
    ours = dict(golden.network.named_parameters())
    wanted = {key[5:] for key in golden.data if key.startswith("grad/")}
    assert wanted == set(ours)
    for name in wanted:
        gradient = torch.zeros_like(ours[name]) if ours[name].grad is None else ours[name].grad
        assert_close(gradient, golden[f"grad/{name}"], atol=2e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("path", golden_params("vip5"))
def test_golden_generation(path):
    """transformers' generate on our network: the official hypotheses, in the official order."""
    golden = Golden(path)
    eos = golden.config["eos_token_id"]

    def cut(rows):
        return [row[1 : row.index(eos) + 1] if eos in row else row[1:] for row in rows.tolist()]

    with torch.no_grad():
        _, _, encoded, mask = golden.encode()
        beam, length = golden.config["beam"]["num_beams"], golden.config["beam"]["max_length"]
        common = {"attention_mask": mask, "max_length": length, "do_sample": False}
        found = golden.network.generate(
            encoder_outputs=golden.network.encoder_outputs(encoded),
            num_beams=beam,
            num_return_sequences=beam,
            early_stopping=True,
            length_penalty=1.0,
            return_dict_in_generate=True,
            output_scores=True,
            **common,
        )
        greedy = golden.network.generate(encoder_outputs=golden.network.encoder_outputs(encoded), num_beams=1, **common)
    ours, theirs = cut(found.sequences), cut(golden["out/beam_sequences"])
    theirs_greedy = cut(golden["out/greedy_sequences"])
    assert ours == theirs
    assert [row[: len(t)] for row, t in zip(cut(greedy), theirs_greedy)] == theirs_greedy
    for score, wanted, row in zip(found.sequences_scores, golden["out/beam_scores"], theirs):
        if row[-1] == eos:
            assert_close(score, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", golden_params("vip5"))
def test_golden_sizes_from_the_parameters_alone(path):
    golden = Golden(path)
    read = settings_of_checkpoint(golden.state, NetworkSettings(vocab_size=golden.config["vocab_size"]))
    names = ["d_model", "d_ff", "d_kv", "num_heads", "num_layers", "num_decoder_layers", "feat_dim", "n_vis_tokens"]
    names += ["add_adapter_cross_attn"] + (["reduction_factor"] if golden.config["use_adapter"] else [])
    assert {name: getattr(read, name) for name in names} == {name: golden.config[name] for name in names}


@pytest.mark.parametrize(
    "changes, trainable, total",
    [
        ({"n_vis_tokens": 2}, 2_788_736, 63_797_120),
        ({"n_vis_tokens": 1}, 2_263_168, 63_271_552),
        ({"n_vis_tokens": 1, "add_adapter_cross_attn": False}, 1_866_496, 62_874_880),
        ({"n_vis_tokens": 1, "use_adapter": False}, 61_288_192, 61_288_192),
    ],
)
def test_trainable_share_is_that_of_the_paper(changes, trainable, total):
    """Counts of the official class at T5-small size; the last three are the rows of the paper's table 5 (3.58, 2.97 and 100 %)."""
    with torch.device("meta"):
        network = VIP5Network(NetworkSettings(**changes))
    network.choose_fine_tuning(everything=changes.get("use_adapter") is False)
    assert sum(p.numel() for p in network.parameters()) == total
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == trainable


TINY = NetworkSettings(
    vocab_size=40, d_model=16, d_ff=32, d_kv=4, num_heads=2, num_layers=1, num_decoder_layers=1, feat_dim=6, reduction_factor=4
)


def test_t5_and_p5_checkpoints_fit():
    torch.manual_seed(0)
    network = VIP5Network(TINY)
    state = {n: v.clone() for n, v in VIP5Network(TINY).state_dict().items() if "adapter" not in n and "visual" not in n}
    state.pop("encoder.category_embeddings.weight")
    state["encoder.whole_word_embeddings.weight"] = state["encoder.whole_word_embeddings.weight"][:512]
    state["shared.weight"] = torch.cat([state["shared.weight"], torch.ones(8, 16)])  # rows the tokenizer does not know
    before = network.encoder.whole_word_embeddings.weight.detach().clone()
    missing = network.load_official(state)
    assert all("adapter" in n or "visual" in n or "category" in n for n in missing) and missing
    words = network.encoder.whole_word_embeddings.weight
    assert torch.equal(words[:512], state["encoder.whole_word_embeddings.weight"]) and torch.equal(words[512:], before[512:])
    assert torch.equal(network.lm_head.weight, state["shared.weight"][:40])


def test_a_checkpoint_of_another_size_says_what_must_fit():
    network = VIP5Network(TINY)
    state = VIP5Network(NetworkSettings(**{**TINY.__dict__, "n_vis_tokens": 1})).state_dict()
    with pytest.raises(UserError, match="visual_tokens"):
        network.load_official(state)


def test_separate_adapters_follow_each_samples_task():
    torch.manual_seed(0)
    network = VIP5Network(NetworkSettings(**{**TINY.__dict__, "use_single_adapter": False})).eval()
    adapters = network.encoder.block[0].layer[0].attn_adapter
    x = torch.randn(3, 2, 16)
    network.set_tasks(torch.tensor([2, 0, 1]))
    mixed = adapters(x)
    for row, task in enumerate(("explanation", "sequential", "direct")):
        assert_close(mixed[row], adapters.adapters[task](x[row]))


def test_a_copied_network_uses_its_own_adapters():
    torch.manual_seed(0)
    network = VIP5Network(TINY).eval()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "adapter" in name:
                parameter.zero_()
        x, mask = torch.randn(1, 3, 16), torch.ones(1, 3)
        assert not torch.allclose(twin.encode(x, mask), network.encode(x, mask))
