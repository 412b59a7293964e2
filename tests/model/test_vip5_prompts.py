"""Templates, rendering and the tokenizer."""

import re

import numpy as np
import pytest
import yaml

from recbole_mm.errors import UserError
from recbole_mm.model.vip5.prompts import Facts, Renderer, Slots, held_out, load_prompts, unpack
from recbole_mm.model.vip5.tokenizer import EOS, PHOTO, load_tokenizer, train_tokenizer
from recbole_mm.paths import properties_dir
from tests.model.vip5_data import build, write_dataset
from tests.support import GOLDEN

FACTS = Facts(np.array([0, 251, 7]), np.array([0, 4567, 12, 901]), ["", "Ann de Vries", "B. O'Neil"], ["", "Red lamp, 12 cm", "Mug", ""])
SLOTS = Slots(
    user=1, item=2, items=np.array([1, 3, 2]), separator=1, yes=True, headline="Good buy !", stars="4", feature="lamp", explanation="Nice mug", rating="3.9"
)  # fmt: skip


def pieces():
    texts = [p.source + " " + p.target for p in load_prompts().values()] + ["Red lamp Mug Good buy Nice"]
    return train_tokenizer(texts, ["251", "7", "4567", "12", "901"], 400)


def test_there_are_exactly_the_29_published_prompts():
    prompts = load_prompts()
    assert len(prompts) == 29
    assert [sum(p.task == t for p in prompts.values()) for t in ("sequential", "direct", "explanation")] == [9, 8, 12]
    assert held_out(prompts) == {"A-9", "B-8", "C-12"}


def test_the_prompts_without_the_user_are_found_by_their_name(tmp_path, monkeypatch):
    prompts = load_prompts("prompts_no_user.yaml")
    assert prompts["A-10"].source_args == ("purchase_history",) and prompts["A-10"].kind == "next"
    assert prompts["B-7"] == load_prompts()["B-7"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts_no_user.yaml").write_text("prompts: []\n", encoding="utf-8")
    assert load_prompts("prompts_no_user.yaml") == {}  # a file of that name where the command runs goes first
    with pytest.raises(UserError, match=r"prompts_of_mine\.yaml"):
        load_prompts("prompts_of_mine.yaml")


@pytest.mark.skipif(not (GOLDEN.parent / "vip5" / "prompts.yaml").is_file(), reason=f"no vip5/prompts.yaml beside {GOLDEN}")
def test_golden_prompts_are_identical_strings():
    theirs = yaml.safe_load((GOLDEN.parent / "vip5" / "prompts.yaml").read_text(encoding="utf-8"))
    ours = yaml.safe_load((properties_dir() / "vip5" / "prompts.yaml").read_text(encoding="utf-8"))
    assert ours == theirs


def whole_words(names):
    """Whole-word numbers by the specification, from piece names."""
    count, out = 0, []
    for name in names:
        count += name.startswith("▁") or name == PHOTO
        out.append(count)
    return [*out, 0]


@pytest.mark.parametrize("k", [0, 1, 2])
def test_rendering_from_cached_parts_equals_tokenising_the_text(k):
    tok = pieces()
    renderer = Renderer(FACTS, tok, k)
    for prompt in load_prompts().values():
        source, target = renderer.text(prompt, SLOTS)
        encoding = tok.tokenizer.encode(source)
        ids, words, visual = (x[0].tolist() for x in unpack([renderer.source(prompt, SLOTS)]))
        assert ids == [*encoding.ids, EOS], prompt.id
        assert words == whole_words([tok.tokenizer.id_to_token(i) for i in encoding.ids]), prompt.id
        items = list(SLOTS.items) if {"candidates", "purchase_history"} & set(prompt.source_args) else []
        items += [SLOTS.item] if "item_photo" in prompt.source_args else []
        assert [v for v in visual if v >= 0] == [item * k + j for item in items for j in range(k)], prompt.id
        assert renderer.target(prompt, SLOTS).tolist() == [*tok.tokenizer.encode(target).ids, EOS], prompt.id


def test_strings_are_those_of_the_release():
    renderer = Renderer(FACTS, pieces(), 2)
    prompts = load_prompts()
    ph = "<extra_id_0> <extra_id_0>"
    assert renderer.text(prompts["A-3"], SLOTS) == (
        f"Here is the purchase history list of user_251 : \n 4567 {ph} -> 901 {ph} -> 12 {ph} \n try to recommend next item to the user", "12"
    )  # fmt: skip
    assert renderer.text(prompts["B-1"], SLOTS) == (f"Will user_251 likely to interact with item_12 {ph} ?", "yes")
    assert renderer.text(prompts["C-8"], SLOTS)[1] == "3.9 , Nice mug"


def test_a_sentinel_in_a_title_is_no_picture():
    facts = Facts(FACTS.user_number, FACTS.item_number, FACTS.user_names, ["", "x", "Lamp <extra_id_0> new", ""])
    _, _, visual = unpack([Renderer(facts, pieces(), 1).source(load_prompts()["B-4"], SLOTS)])
    assert (visual >= 0).sum() == 1


def test_long_sources_are_cut_and_keep_the_end_mark():
    renderer = Renderer(FACTS, pieces(), 2, max_source=20)
    tokens = renderer.source(load_prompts()["A-3"], SLOTS)
    assert len(tokens) == 20 and tokens[-1] == EOS


def test_the_tokenizer_is_the_same_every_time_and_reads_numbers_whole(tmp_path):
    first, second = pieces(), pieces()
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    assert len(first.ids("4567")) == 1 and first.ids("item_4567").tolist()[-1] == first.ids("4567")[0]
    assert first.text(first.ids("predict next item").tolist()) == "predict next item"
    first.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).ids("Red lamp 12").tolist() == first.ids("Red lamp 12").tolist()
    with pytest.raises(UserError, match=re.escape("tokenizer.json")):
        load_tokenizer(tmp_path / "nothing")


def test_digits_are_pieces_where_asked():
    tok = train_tokenizer(["predict next"], ["4567"], 100, whole_numbers=False)
    assert tok.text(tok.ids("4567").tolist()) == "4567" and len(tok.ids("4567")) > 1


def test_prompts_the_data_cannot_fill_name_the_missing_field(tmp_path):
    """What amazon-beauty is: interactions alone."""
    _, model, _ = build(write_dataset(tmp_path, reviews=False, features=False))
    assert model.tasks == ("sequential", "direct") and model.k == 0
    possible = {p.id for p in model.all_prompts.values() if not model.missing(p)}
    assert possible == {"A-1", "A-2", "A-3", "A-7", "B-1", "B-7", "B-8"}
    for name, column in (("A-4", "'name'"), ("B-4", "'title'"), ("C-2", "'summary'"), ("C-8", "'name'"), ("C-7", "'feature_word'")):
        with pytest.raises(UserError, match=column):
            model.require(model.all_prompts[name])


def test_all_prompts_can_be_rendered_where_the_data_have_every_field(tmp_path):
    _, model, _ = build(write_dataset(tmp_path))
    assert not [p.id for p in model.all_prompts.values() if model.missing(p)]
