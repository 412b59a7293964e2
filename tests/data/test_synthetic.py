"""The bundled shop: made from a seed, and every planted signal is there and visible only where it should be."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.shop_oracles import RANKINGS, Truth, feature_words, groups_from_histories, measure, scores
from recbole_mm.data.synthetic import (
    ATTRIBUTES,
    GROUPS,
    KINDS,
    LEADS,
    TEXTUAL,
    VALUES,
    VERSION,
    VISUAL,
    draw_pictures,
    main,
    make_shop,
    planted_features,
    write_shop,
)
from recbole_mm.errors import UserError
from recbole_mm.paths import bundled_dataset_dir

BUNDLED = bundled_dataset_dir() / "shop"


@pytest.fixture(scope="module")
def shop():
    return make_shop()


@pytest.fixture(scope="module")
def truth():
    return Truth(BUNDLED)


def read(path) -> pd.DataFrame:
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    return table.rename(columns=lambda c: c.split(":")[0])


def test_the_bundled_tables_are_what_the_generator_makes(shop):
    about = json.loads((BUNDLED / "shop.json").read_text())
    assert (about["version"], about["seed"]) == (VERSION, shop.seed)
    for suffix, table in (("inter", shop.interactions), ("item", shop.items), ("user", shop.users)):
        pd.testing.assert_frame_equal(read(BUNDLED / f"shop.{suffix}"), table.astype(str), check_dtype=False)
    with np.load(BUNDLED / "truth.npz") as stored:
        np.testing.assert_array_equal(stored["attributes"], shop.attributes)
        np.testing.assert_array_equal(stored["group"], shop.group)
        np.testing.assert_array_equal(stored["kind"], shop.kind)


def test_pictures_follow_from_the_seed_and_are_what_the_bundled_files_show(shop):
    rows = np.arange(0, 40)
    pixels = draw_pictures(shop.attributes[rows], shop.kind[rows], shop.seed)
    np.testing.assert_array_equal(pixels, draw_pictures(shop.attributes[rows], shop.kind[rows], shop.seed))
    assert (pixels != draw_pictures(shop.attributes[rows], shop.kind[rows], shop.seed + 1)).any()
    for row in rows:
        decoded = np.asarray(Image.open(BUNDLED / "images" / f"{shop.items['item_id'][row]}.jpg").convert("RGB"), np.int64)
        assert decoded.shape == (64, 64, 3)
        error = abs(decoded - pixels).mean((1, 2, 3))  # JPEG's own loss against the difference to other items' pictures
        assert error[row] < 16 and error[row] < 0.7 * np.delete(error, row).min()


def test_the_seed_decides():
    small = {"users": 60, "items": 80, "interactions": 600}
    one, same, other = make_shop(**small, seed=1), make_shop(**small, seed=1), make_shop(**small, seed=2)
    pd.testing.assert_frame_equal(one.interactions, same.interactions)
    assert not one.interactions.equals(other.interactions)


def test_sizes_and_the_weight_of_what_is_committed(shop):
    assert (len(shop.users), len(shop.items)) == (1000, 1000)
    assert 19_500 < len(shop.interactions) < 20_500
    files = [BUNDLED / f"shop.{s}" for s in ("inter", "item", "user", "json")] + [BUNDLED / "truth.npz", *BUNDLED.glob("images/*.jpg")]
    assert len(files) == 1005
    assert sum(path.stat().st_size for path in files) < 5_000_000


def test_nobody_buys_twice_and_time_rises(shop):
    assert not shop.interactions.duplicated(["user_id", "item_id"]).any()
    assert not shop.interactions.duplicated(["user_id", "timestamp"]).any()
    assert shop.interactions.groupby("user_id").size().min() >= 5


def test_new_items_never_occur_in_training(shop, truth):
    assert set(np.flatnonzero(truth.cold)) <= set(np.flatnonzero(truth.unseen))
    assert 0.35 < truth.unseen[truth.test_item].mean() < 0.55
    ordered = shop.interactions.sort_values("timestamp")
    arrived = ordered["item_id"].isin(set(shop.items["item_id"][shop.cold])).to_numpy()
    assert arrived[: int(0.8 * len(ordered))].sum() == 0


def test_texts_name_textual_attributes_only(shop):
    texts = (shop.items["title"] + " " + shop.items["description"] + " " + shop.items["categories"]).str.lower()
    for column, name in enumerate(ATTRIBUTES):
        words = np.array([w.lower() for w in VALUES[name]])
        if name in TEXTUAL:
            assert all(word in text for word, text in zip(words[shop.attributes[:, column]], texts))
        else:
            assert not texts.str.contains("|".join(rf"\b{w}\b" for w in words)).any()


def test_titles_and_grounds_of_pictures_tell_the_kind(shop):
    assert all(KINDS[k] in title.split() for k, title in zip(shop.kind, shop.items["title"]))
    pixels = draw_pictures(shop.attributes[:400], shop.kind[:400], shop.seed).astype(np.float64)
    edge = np.concatenate([pixels[:, :4].reshape(400, -1, 3), pixels[:, -4:].reshape(400, -1, 3)], axis=1).mean(1)
    tone = edge / edge.sum(1, keepdims=True)
    means = np.stack([tone[:200][shop.kind[:200] == k].mean(0) for k in range(len(KINDS))])
    found = ((tone[200:, None] - means) ** 2).sum(-1).argmin(1)
    assert (found == shop.kind[200:400]).mean() > 0.7


def test_users_buy_the_kinds_they_like(shop):
    liked = (shop.user_kinds[shop.user] == shop.kind[shop.item][:, None]).any(1)
    assert liked.mean() > 0.6  # two kinds of ten


def test_the_feature_word_is_the_groups_lead_value_and_only_the_review_says_it(shop):
    rows = shop.interactions.sort_values(["user_id", "timestamp"]).reset_index(drop=True)
    group = dict(zip(shop.users["user_id"], shop.group))
    attributes = dict(zip(shop.items["item_id"], shop.attributes))
    for row in rows.iloc[:300].itertuples():
        lead = GROUPS[group[row.user_id]][0]
        word = VALUES[lead][attributes[row.item_id][ATTRIBUTES.index(lead)]]
        assert row.feature_word == word and word in row.review.split() and word not in row.summary.split()


def test_ratings_follow_taste(shop):
    lead = LEADS[shop.group[shop.user]]
    liked = (shop.favourites[shop.group[shop.user]] == shop.attributes[shop.item, lead][:, None]).any(1)
    rows = shop.interactions.merge(shop.users.assign(row=range(len(shop.users)))[["user_id", "row"]], on="user_id")
    rows = rows.sort_values(["row", "timestamp"])["rating"].to_numpy()
    assert set(rows) == {1, 2, 3, 4, 5}
    assert rows[liked].mean() - rows[~liked].mean() > 0.8


def test_each_signal_can_be_told_apart(truth):
    """Taking one signal from the oracle costs more than three standard errors of a recall over a thousand users."""
    recall = {name: measure(truth, scores(truth, signals, np.random.default_rng(0))) for name, signals in RANKINGS.items()}
    full = recall["all signals"]["recall@20"]
    assert full > 0.35
    for name in (
        "all but pictures",
        "all but texts",
        "all but order",
        "all but the user's own value",
        "all but the user's kinds",
        "groups shuffled among users",
    ):
        assert recall[name]["recall@20"] < full - 0.045, name
    assert recall["popularity only"]["cold"] == 0
    assert min(recall["content only, pictures"]["cold"], recall["content only, texts"]["cold"]) > 0.05
    both = recall["content only, both"]["recall@20"]
    assert both > 1.5 * max(recall["content only, pictures"]["recall@20"], recall["content only, texts"]["recall@20"])


def test_groups_can_be_recovered_from_histories_with_both_modalities(truth):
    groups = groups_from_histories(truth)
    assert groups["pictures and texts"] > 0.85
    assert groups["interactions alone (SVD, 16)"] < 0.4 and abs(groups["shuffled users"]) < 0.02


def test_feature_words_need_group_and_picture(truth):
    words = feature_words(truth)
    assert words["group and content known"] == 1
    assert words["group and text known, picture guessed"] < 0.75
    assert 0.4 < words["share of words that only the picture shows"] < 0.6


def test_classic_style_statistics_of_a_picture_show_colour_and_pattern(shop):
    """A nearest-mean classifier on plain pixel statistics: colour from mean hue channels, plain against inked from gradients."""
    attributes = shop.attributes[:300]
    pixels = draw_pictures(attributes, shop.kind[:300], shop.seed).astype(np.float64) / 255
    centre = pixels[:, 16:48, 16:48].reshape(len(pixels), -1, 3)
    saturated = centre.max(-1) - centre.min(-1)
    mean = (centre * saturated[..., None]).sum(1) / saturated.sum(1, keepdims=True)
    mean /= mean.sum(1, keepdims=True)
    colour = attributes[:, ATTRIBUTES.index("colour")]
    means = np.stack([mean[:150][colour[:150] == c].mean(0) for c in range(6)])
    found = ((mean[150:, None] - means[None]) ** 2).sum(-1).argmin(1)
    assert (found == colour[150:]).mean() > 0.9


def test_a_shop_of_benchmark_layout_has_features_in_place_of_pictures(tmp_path):
    assert main(["--out", str(tmp_path / "big"), "--users", "400", "--items", "300", "--interactions", "3400", "--no-pictures"]) == 0
    folder = tmp_path / "big"
    assert sorted(p.name for p in folder.iterdir()) == [
        "big.inter", "big.item", "big.user", "item_ids.txt", "shop.json", "textual.npy", "truth.npz", "visual.npy",
    ]  # fmt: skip
    visual = np.load(folder / "visual.npy")
    assert visual.shape == (300, 128) and visual.dtype == np.float16 and np.isfinite(visual).all()
    assert (folder / "item_ids.txt").read_text().split() == list(read(folder / "big.item")["item_id"])
    assert list(read(folder / "big.inter")) == ["user_id", "item_id", "rating", "timestamp"]


def test_planted_features_show_their_own_modality_only():
    shop = make_shop(users=300, items=1500, interactions=3000, seed=3)
    tables = planted_features(shop)
    for modality, own, other in (("visual", VISUAL, TEXTUAL), ("textual", TEXTUAL, VISUAL)):
        x = tables[modality].astype(np.float64)
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)

        def accuracy(name, x=x):
            labels = shop.attributes[:, ATTRIBUTES.index(name)]
            weights = np.linalg.lstsq(x[:1000], np.eye(6)[labels[:1000]], rcond=None)[0]
            return ((x[1000:] @ weights).argmax(1) == labels[1000:]).mean()

        assert min(accuracy(name) for name in own) > 0.95
        assert max(accuracy(name) for name in other) < 0.85  # what STYLE lets through


@pytest.mark.parametrize(
    "size, words",
    [((3, 100, 60), "at least 6 users"), ((100, 100, 300), "5 to 25 interactions per user"), ((100, 100, 4000), "on average")],
)
def test_impossible_sizes_are_refused(size, words):
    with pytest.raises(UserError, match=words):
        make_shop(*size)


def test_a_written_shop_has_every_picture(tmp_path):
    shop = make_shop(users=12, items=50, interactions=80, seed=5)
    write_shop(shop, tmp_path / "tiny")
    assert {p.stem for p in (tmp_path / "tiny" / "images").iterdir()} == set(shop.items["item_id"])
