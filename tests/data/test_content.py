"""Item texts and pictures, also when whoever made the dataset was careless or worse."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_mm.data.content import ItemContent, open_picture
from recbole_mm.errors import UserError

TOKENS = ["[PAD]", "b", "a", "../x"]


class Half:
    """Resizes to S x S, as an encoder's transform does."""

    def __init__(self, size=4):
        self.size = size
        self.calls = 0

    def resize(self, picture):
        self.calls += 1
        return torch.from_numpy(np.array(picture.resize((self.size, self.size)))).permute(2, 0, 1)

    def describe(self):
        return {"size": self.size}


@pytest.fixture
def shop(tmp_path):
    folder = tmp_path / "shop"
    (folder / "images").mkdir(parents=True)
    (folder / "shop.item").write_text(
        'item_id:token\ttitle:token_seq\tdescription:token_seq\tbrand:token\na\tRed mug\tHolds "much" tea .\tAcme\nb\tLamp\t\tBrindel\n',
        encoding="utf-8",
    )
    for token, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (10, 8), colour).save(folder / "images" / f"{token}.png")
    return folder


def test_texts_join_the_fields_that_exist(shop):
    content = ItemContent(shop, TOKENS)
    assert content.texts([1, 2, 3, 0]) == ["Lamp. Brindel", 'Red mug. Holds "much" tea. Acme', "", ""]
    assert content.title(2) == "Red mug" and content.title(3) == "" and content.has_texts
    assert ItemContent(shop, TOKENS, text_fields=["brand", "title"]).text(1) == "Brindel. Lamp"
    assert not ItemContent(shop, TOKENS, text_fields=["plot"]).has_texts


def test_a_dataset_without_texts_or_pictures(tmp_path):
    content = ItemContent(tmp_path, TOKENS)
    assert not content.has_texts and not content.has_images and content.title(1) == "" and content.image_path(1) is None
    with pytest.raises(UserError, match="no picture"):
        content.image(1)


@pytest.mark.parametrize("data", [b"item_id:token\ttitle\n\xff\xfe\t\xff\n", b""])
def test_broken_item_files(shop, data):
    (shop / "shop.item").write_bytes(data)
    with pytest.raises(UserError, match="shop.item: expected UTF-8 text with columns"):
        ItemContent(shop, TOKENS).text(1)


def test_pictures_are_found_by_token_only(shop):
    Image.new("RGB", (4, 4)).save(shop / "x.png")  # what the token ../x would lead to
    content = ItemContent(shop, TOKENS)
    assert content.image_path(1).name == "b.png" and content.image_path(3) is None and content.image_path(0) is None
    assert content.image(2).getpixel((0, 0)) == (255, 0, 0)


def test_links_out_of_the_dataset_are_refused(shop, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (shop / "images" / "c.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="link out of the dataset"):
        ItemContent(shop, TOKENS)
    (shop / "images" / "c.png").unlink()
    (tmp_path / "elsewhere").mkdir()
    (shop / "pictures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of the dataset"):
        ItemContent(shop, TOKENS, image_folder="pictures")
    with pytest.raises(UserError, match="leads out of the dataset"):
        ItemContent(shop, TOKENS, image_folder="../elsewhere")
    assert not ItemContent(shop, TOKENS, image_folder=str(tmp_path / "elsewhere")).has_images, "an absolute path is the user's own choice"


def png_claiming(width, height):
    """A PNG of a few bytes that says it is enormous."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data, says",
    [
        (png_claiming(40_000, 40_000), "claims 40000 x 40000 pixels|no picture that can be read"),
        (png_claiming(12_000, 12_000), "claims 12000 x 12000 pixels"),
        (png_claiming(100, 100), "no picture that can be read"),
        (b"", "no picture that can be read"),
        (b"<html>404</html>", "no picture that can be read"),
    ],
    ids=["bomb", "large", "short", "empty", "html"],
)
def test_bombs_and_broken_pictures(shop, data, says):
    (shop / "images" / "a.png").write_bytes(data)
    with pytest.raises(UserError, match=says) as caught:
        ItemContent(shop, TOKENS).image(2)
    assert "a.png" in str(caught.value)


def test_a_cut_picture_is_broken(shop):
    path = shop / "images" / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="no picture that can be read"):
        open_picture(path)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(shop, mode):
    Image.new("RGB", (5, 5), "white").convert(mode).save(shop / "images" / ("a.jpg" if mode == "CMYK" else "a.png"))
    assert open_picture(ItemContent(shop, TOKENS).image_path(2)).mode == "RGB"


def test_pictures_are_decoded_once(shop):
    transform = Half()
    first = ItemContent(shop, TOKENS).image_tensor([2, 3, 0, 1, 2], transform)
    assert first.shape == (5, 3, 4, 4) and first.dtype == torch.uint8
    assert first[0, :, 0, 0].tolist() == [255, 0, 0] and first[3, :, 0, 0].tolist() == [0, 0, 255]
    assert not first[1].any() and not first[2].any() and torch.equal(first[0], first[4])
    calls = transform.calls
    again = ItemContent(shop, ["[PAD]", "a"]).image_tensor([1], transform)  # other ids, same pictures
    assert transform.calls == calls and torch.equal(again[0], first[0])


def test_the_cache_follows_the_files_and_the_transform(shop):
    assert ItemContent(shop, TOKENS).image_tensor([2], Half())[0, 0, 0, 0] == 255
    Image.new("RGB", (10, 8), "black").save(shop / "images" / "a.png")
    assert ItemContent(shop, TOKENS).image_tensor([2], Half())[0, 0, 0, 0] == 0
    assert ItemContent(shop, TOKENS).image_tensor([2], Half(6)).shape[-1] == 6


def test_what_a_kill_left_of_the_cache_goes(shop):
    content, transform = ItemContent(shop, TOKENS), Half()
    content.image_tensor([1, 2], transform)
    (whole,) = (shop / ".cache").iterdir()
    half, other = whole.with_name(f".{whole.stem}.wuh1urdo.npy"), whole.with_name(".pixels-of-another.wuh1urdo.npy")
    whole.rename(half)
    other.touch()
    ItemContent(shop, TOKENS).image_tensor([1, 2], transform)
    assert sorted((shop / ".cache").iterdir()) == sorted([whole, other])


def test_all_broken_pictures_are_reported_at_once(shop):
    for token in "cde":
        (shop / "images" / f"{token}.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="3 pictures cannot be read. The first: .*c.jpg"):
        ItemContent(shop, TOKENS).image_tensor([1], Half())
    assert not list((shop / ".cache").iterdir()), "no cache with holes is left"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_picture(shop):
    os.mkfifo(shop / "images" / "../images/p.png")
    assert ItemContent(shop, ["[PAD]", "p"]).image_path(1) is None


def test_of_an_item_that_stands_there_twice_the_first_row_counts(shop):
    with open(shop / "shop.item", "a", encoding="utf-8") as file:
        file.write("b\tSecond lamp\t\tBrindel\n")
    assert ItemContent(shop, TOKENS).title(1) == "Lamp"


def test_words_that_pandas_takes_for_missing_stay_words(shop):
    (shop / "shop.item").write_text("asin:token\titem_id:token\ttitle:token_seq\nx\ta\tNone\ny\tb\tNA\n", encoding="utf-8")
    content = ItemContent(shop, TOKENS)
    assert content.texts([1, 2]) == ["NA", "None"], "and the column of tokens need not be the first"
    assert ItemContent(shop, ["[PAD]", "y"], id_field="asin").title(1) == "NA"
