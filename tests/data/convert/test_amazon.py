import gzip
import json

import pytest

from recbole_mm.data.convert.amazon import parse, picture_url
from recbole_mm.errors import UserError
from tests.data.convert.support import balanced, counts, pairs, rows, run

CORE = [(f"U{u}", f"B{i}", 10 * u + i) for u in range(6) for i in range(6)]


def old_review(user, item, time, **more):
    return {
        "reviewerID": user,
        "asin": item,
        "overall": 4.0,
        "unixReviewTime": time,
        "reviewText": "Fine\tone",
        "summary": 'So "so"',
        **more,
    }


def new_review(user, item, time, **more):
    return {
        "user_id": user,
        "parent_asin": item,
        "asin": "X",
        "rating": 5,
        "timestamp": time * 1000,
        "text": "Good",
        "title": "Yes",
        **more,
    }


def write_gz(path, lines):
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in lines)
    return path


@pytest.mark.parametrize("review, rating", [(old_review, "4"), (new_review, "5")])
def test_reviews_of_every_edition(tmp_path, review, rating):
    source = write_gz(tmp_path / "r.json.gz", [json.dumps(review(*r)) for r in CORE])
    assert run("amazon", "--src", source, "--out", tmp_path / "toys") == 0
    read = rows(tmp_path / "toys" / "toys.inter")
    assert [(r["user_id"], r["item_id"], int(r["timestamp"])) for r in read] == CORE
    assert {r["rating"] for r in read} == {rating}
    text = (tmp_path / "toys" / "toys.yaml").read_text()
    assert "valid_and_test" in text and "[user_id, item_id, rating, timestamp]" in text
    if review is old_review:
        assert read[0]["review"] == "Fine one" and read[0]["summary"] == "So 'so'"  # no tabs, no double quotes
    assert (tmp_path / "toys" / "card.md").is_file()


def test_everything_dropped_is_counted_with_its_reason(tmp_path):
    broken = [
        "no json", json.dumps([1]), json.dumps({"asin": "B1"}), json.dumps(old_review("NA", "B1", 1)), json.dumps(old_review("U1 ", "B1", 1)),
        json.dumps(old_review("U1", "B1", 1, overall=None)), json.dumps(old_review("U1", "B1", 1, overall=float("nan"))),
        json.dumps(old_review("rare", "B1", 1)), json.dumps(old_review("U1", "B1", 99)),
    ]  # fmt: skip
    source = write_gz(tmp_path / "r.json.gz", [json.dumps(old_review(*r)) for r in CORE] + broken)
    run("amazon", "--src", source, "--out", tmp_path / "toys")
    assert counts(tmp_path / "toys")["dropped"]["interactions"] == {
        "a line that is no JSON object": 2,
        "a user or item without a name (or one that reads as a missing value)": 2,
        "a user or item token with quotes, control characters or blanks at its ends": 1,
        "rating is missing or no number": 2,
        "the same user and item again": 1,
        "user or item with fewer than 5 interactions": 1,
    }
    assert balanced(tmp_path / "toys", len(CORE))


def test_metadata_of_every_edition_names_and_the_download_list(tmp_path):
    source = write_gz(tmp_path / "r.json.gz", [json.dumps(old_review(*r, reviewerName=f"Name {r[0]}")) for r in CORE])
    meta = [
        repr({"asin": "B0", "title": 'It\'s "odd"', "imUrl": "http://x.org/0.jpg", "categories": [["Toys", "Dolls"]], "brand": "Acme"}),
        json.dumps(
            {"asin": "B1", "title": "One", "imageURLHighRes": ["http://x.org/1.png"], "category": ["Toys"], "description": ["a", "b"]}
        ),
        json.dumps({"parent_asin": "B2", "title": "Two", "images": [{"large": "https://x.org/2.jpg"}], "store": "Shop", "price": 3.5}),
        json.dumps({"asin": "B3", "title": "Three", "imUrl": "file:///etc/passwd"}),
        json.dumps({"asin": "other", "title": "Not ours"}),
        json.dumps({"asin": "B1", "title": "Twice"}),
        "__import__('os').system('true')",
    ]
    run("amazon", "--src", source, "--meta", write_gz(tmp_path / "m.json.gz", meta), "--out", tmp_path / "toys")
    items = {r["item_id"]: r for r in rows(tmp_path / "toys" / "toys.item")}
    assert items["B0"]["title"] == "It's 'odd'" and items["B0"]["categories"] == "Toys Dolls" and items["B0"]["brand"] == "Acme"
    assert items["B1"]["description"] == "a b" and items["B2"]["brand"] == "Shop" and items["B2"]["price"] == "3.5"
    assert items["B5"]["title"] == "" and len(items) == 6
    listing = (tmp_path / "toys" / "images.csv").read_text().splitlines()
    assert listing == ["item_id,url", "B0,http://x.org/0.jpg", "B1,http://x.org/1.png", "B2,https://x.org/2.jpg"]
    dropped = counts(tmp_path / "toys")["dropped"]
    assert dropped["items"] == {
        "metadata of an item without interactions": 1, "metadata given twice": 1, "a line that is neither JSON nor a Python literal": 1,
    }  # fmt: skip
    assert dropped["pictures"] == {"item without a picture address": 1}
    assert {r["user_id"]: r["name"] for r in rows(tmp_path / "toys" / "toys.user")}["U3"] == "Name U3"


def test_8_1_1_makes_ready_split_files(tmp_path):
    source = write_gz(tmp_path / "r.json.gz", [json.dumps(old_review(*r)) for r in CORE])
    run("amazon", "--src", source, "--out", tmp_path / "toys", "--split", "8:1:1", "--no-text")
    parts = [pairs(tmp_path / "toys" / f"toys.{part}.inter") for part in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [24, 6, 6]
    assert sorted(sum(parts, [])) == sorted((u, i) for u, i, _ in CORE)
    assert "benchmark_filename: [train, valid, test]" in (tmp_path / "toys" / "toys.yaml").read_text()


def test_a_damaged_file_leaves_nothing_behind(tmp_path):
    source = write_gz(tmp_path / "r.json.gz", [json.dumps(old_review(*r)) for r in CORE])
    source.write_bytes(source.read_bytes()[:-30])
    with pytest.raises(UserError, match="damaged or cut short"):
        run("amazon", "--src", source, "--out", tmp_path / "toys")
    assert [p.name for p in tmp_path.iterdir()] == ["r.json.gz"]


def test_too_strict_a_filter_says_so(tmp_path):
    source = write_gz(tmp_path / "r.json.gz", [json.dumps(old_review(*r)) for r in CORE])
    with pytest.raises(UserError, match=r"No interaction is left of 36 read: .*fewer than 7.*Lower --k-core"):
        run("amazon", "--src", source, "--out", tmp_path / "toys", "--k-core", "7")


def test_only_literals_are_parsed():
    assert parse(b"{'a': 1}") == {"a": 1} and parse(b"{'a': open('x')}") is None and parse(b"[" * 100_000) is None
    assert picture_url({"images": []}) == "" and picture_url({"imageURL": "http://a/b"}) == "http://a/b"
