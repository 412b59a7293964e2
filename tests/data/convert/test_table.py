import pandas as pd
import pytest
from PIL import Image

from recbole_mm.errors import UserError
from tests.data.convert.support import balanced, counts, pairs, rows, run

CSV = """who,what,stars,when,comment
a,x,5,1,"fine, really"
a,y,4,2,ok
b,x,3,3,"two
lines"
b,y,2,4,
b,y,2,5,again
,x,1,6,nobody
c,z,abc,7,no number
c,z
"""
FLAGS = ["--user", "who", "--item", "what", "--rating", "stars", "--timestamp", "when", "--keep", "comment:token_seq"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    return path


def test_csv(tmp_path, source):
    run("csv", "--src", source, "--out", tmp_path / "d", *FLAGS)
    read = rows(tmp_path / "d" / "d.inter")
    assert [tuple(r.values()) for r in read] == [
        ("a", "x", "5", "1", "fine, really"), ("a", "y", "4", "2", "ok"), ("b", "x", "3", "3", "two lines"), ("b", "y", "2", "4", ""),
    ]  # fmt: skip
    assert counts(tmp_path / "d")["dropped"]["interactions"] == {
        "a user or item without a name (or one that reads as a missing value)": 1, "rating is missing or no number": 1,
        "a row with another number of columns than the first line": 1, "the same user and item again": 1,
    }  # fmt: skip
    assert balanced(tmp_path / "d", 4)


def test_parquet_gives_the_same(tmp_path):
    pytest.importorskip("pyarrow")
    table = pd.DataFrame({"user_id": [1, 1, 2], "item_id": ["x", "y", "x"], "t": pd.to_datetime([5, 6, 7], unit="s", utc=True)})
    table.to_parquet(tmp_path / "t.parquet")
    run("parquet", "--src", tmp_path / "t.parquet", "--out", tmp_path / "d", "--timestamp", "t")
    assert [tuple(r.values()) for r in rows(tmp_path / "d" / "d.inter")] == [("1", "x", "5"), ("1", "y", "6"), ("2", "x", "7")]


def test_items_and_pictures(tmp_path, source):
    (tmp_path / "items.csv").write_text("id,title,weight\nx,A title,1.5\ny,Another,2\nq,Unknown,3\nx,Twice,1\nz\n")
    folder = tmp_path / "p"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "x.png")
    (folder / "y.jpg").write_text("not a picture")
    Image.new("RGB", (4, 4)).save(folder / "other.png")
    run(
        "csv", "--src", source, "--out", tmp_path / "d", *FLAGS, "--items", tmp_path / "items.csv", "--items-id", "id", "--pictures", folder
    )
    header = (tmp_path / "d" / "d.item").read_text().splitlines()[0]
    assert header == "item_id:token\ttitle:token_seq\tweight:float"
    assert [r["item_id"] for r in rows(tmp_path / "d" / "d.item")] == ["x", "y"]
    assert [p.name for p in (tmp_path / "d" / "images").iterdir()] == ["x.png"]
    dropped = counts(tmp_path / "d")["dropped"]
    assert dropped["pictures"] == {"file of no item in the interactions": 1, "not a readable picture": 1}
    assert dropped["items"] == {
        "item without interactions": 1,
        "item given twice": 1,
        "a row with another number of columns than the first line": 1,
    }


def test_a_link_out_of_the_picture_folder_is_not_followed(tmp_path, source):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "x.png").symlink_to(tmp_path / "secret.png")
    run("csv", "--src", source, "--out", tmp_path / "d", *FLAGS, "--pictures", folder)
    assert not list((tmp_path / "d" / "images").iterdir())
    assert "outside the source folder" in str(counts(tmp_path / "d")["dropped"]["pictures"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--user", "whom"], "no column 'whom'; there are who, what.* Did you mean who"),
        (["--keep", "comment:text"], "expected COLUMN:TYPE"),
        (["--separator", ";;"], "expected one character"),
        (["--user", "who", "--item", "what"], "needs times"),
        (["--k-core", "-1", *FLAGS], "expected a number from 0"),
    ],
)
def test_wrong_flags(tmp_path, source, flags, words):
    with pytest.raises(UserError, match=words):
        run("csv", "--src", source, "--out", tmp_path / "d", *flags)
    assert not (tmp_path / "d").exists() and not (tmp_path / ".d.partial").exists()


def test_a_folder_that_is_there_is_kept_unless_told(tmp_path, source):
    run("csv", "--src", source, "--out", tmp_path / "d", *FLAGS)
    (tmp_path / "d" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        run("csv", "--src", source, "--out", tmp_path / "d", *FLAGS)
    assert (tmp_path / "d" / "mine.txt").is_file()
    run("csv", "--src", source, "--out", tmp_path / "d", *FLAGS, "--overwrite")
    assert not (tmp_path / "d" / "mine.txt").exists() and len(pairs(tmp_path / "d" / "d.inter")) == 4


def test_what_a_killed_conversion_left_is_cleared(tmp_path, source):
    (tmp_path / ".d.partial").mkdir()
    (tmp_path / ".d.partial" / "d.user").write_text("half")
    run("csv", "--src", source, "--out", tmp_path / "d", *FLAGS)
    assert not (tmp_path / "d" / "d.user").exists()


def test_unknown_format_and_source(tmp_path):
    with pytest.raises(UserError, match="Unknown format 'cvs'. Did you mean csv"):
        run("cvs", "--src", tmp_path, "--out", tmp_path / "d")
    with pytest.raises(UserError, match="there is no"):
        run("csv", "--src", tmp_path / "none.csv", "--out", tmp_path / "d")
