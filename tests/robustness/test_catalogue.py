"""A catalogue of bad inputs: each gets one clear paragraph and exit code 2; nothing is half-written and nothing of the user's is touched.

In-process, because a process of its own takes seconds to import PyTorch; test_program.py runs a few through the real program.
"""

import gzip
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_mm import cli
from tests.robustness.world import ITEMS, QUICK, READY, World, check_refusal, check_whole


class Case(NamedTuple):
    """One bad input.

    Attributes:
        name: what is bad.
        words: the command line.
        says: a pattern that the paragraph must match.
        prepare: puts the bad input into the world.
    """

    name: str
    words: list[str]
    says: str
    prepare: Callable[[World], object] = lambda world: None


def bpr(*words: str) -> list[str]:
    """Train BPR; later words win."""
    return together(["--model=BPR", *QUICK], words)


def vbpr(*words: str) -> list[str]:
    return together(["--model=VBPR", *QUICK], words)


def sasrec(*words: str) -> list[str]:
    return together(["--model=SASRec", *QUICK, "--hidden_size=4", "--inner_size=4", "--n_heads=1", "--n_layers=1"], words)


def ready(*words: str) -> list[str]:
    return together(["--model=BPR", *READY], words)


def together(base: list[str], words) -> list[str]:
    keys = {word.partition("=")[0] for word in words}
    return [word for word in base if word.partition("=")[0] not in keys] + list(words)


def extract(*words: str) -> list[str]:
    return ["extract", "--dataset=tiny", "--encoder=classic", "--use_gpu=False", "--encoder_workers=0", *words]


def convert(kind: str, src: str, *words: str) -> list[str]:
    return ["convert", kind, "--src", src, "--out", "dataset/new", "--no-progress", *words]


def recommend(*words: str) -> list[str]:
    return together(["recommend", "--run=saved/r", "--topk=3", "--out=top.csv"], words)


class Evil:
    """Unpickled by anybody who is not careful, it makes a file."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def after_training(change: Callable[[World], object]) -> Callable[[World], None]:
    def prepare(world: World) -> None:
        world.trained()
        change(world)

    return prepare


def flip(path) -> None:
    """Change one byte in the middle of the largest member of a zip file."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 0xFF
    path.write_bytes(content)


def cut(path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def sparse(path, size: int) -> None:
    """A file that says it is large and takes no room."""
    with open(path, "wb") as stream:
        stream.truncate(size)


def bomb(path) -> None:
    """A small PNG that claims 60,000 x 60,000 pixels."""
    Image.new("RGB", (1, 1)).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    path.write_bytes(content)


def replace(name: str, content: str | bytes) -> Callable[[World], object]:
    return lambda world: world.write(name, content)


def features(table) -> Callable[[World], None]:
    def prepare(world: World) -> None:
        np.save(world.data / "visual.npy", table(world.table.copy()), allow_pickle=True)

    return prepare


def put(table: np.ndarray, row: int, value: float) -> np.ndarray:
    table[row, 1] = value
    return table


def header_of_a_huge_table(world: World) -> None:
    """A .npy header that claims 8 TB, over a few bytes."""
    path = world.data / "visual.npy"
    with open(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 2000)})
        stream.write(b"\0" * 100)


def link_out(world: World) -> None:
    (world.root / "secret.png").write_bytes((world.data / "images" / "i1.png").read_bytes())
    (world.data / "images" / "i9.png").symlink_to(world.root / "secret.png")


def folder_link_out(world: World) -> None:
    shutil.move(world.data / "images", world.root / "elsewhere")
    (world.data / "images").symlink_to(world.root / "elsewhere")


def foreign_matrix(world: World) -> None:
    for name in ("trnMat.pkl", "valMat.pkl", "tstMat.pkl"):
        world.write(f"/src/{name}", pickle.dumps(Evil()))


def matrices(*shapes) -> Callable[[World], None]:
    from scipy.sparse import random as random_matrix

    def prepare(world: World) -> None:
        for name, shape in zip(("trnMat.pkl", "valMat.pkl", "tstMat.pkl"), shapes):
            world.write(f"/src/{name}", pickle.dumps(random_matrix(*shape, density=0.3, format="coo", random_state=0)))

    return prepare


def checkpoint_of_another_model(world: World) -> None:
    assert cli.main(together(["--model=VBPR", *QUICK], ["--run_name=other"])) == 0
    shutil.copy(world.root / "saved/other/best.pt", world.root / "saved/r/best.pt")


def other_shape(world: World) -> None:
    path = world.root / "saved/r/best.pt"
    state = torch.load(path, weights_only=True)
    state["state_dict"] = {key: value[:, :2].clone() for key, value in state["state_dict"].items()}
    torch.save(state, path)


def without_key(name: str, key: str) -> Callable[[World], None]:
    def change(world: World) -> None:
        path = world.root / "saved/r" / name
        state = torch.load(path, weights_only=True)
        del state[key]
        torch.save(state, path)

    return change


REVIEW = '{"reviewerID": "A%d", "asin": "B%d", "overall": 4.0, "unixReviewTime": %d}\n'
REVIEWS = "".join(REVIEW % (user, item, user * 9 + item) for user in range(6) for item in range(6))
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9))

SETTINGS = [
    Case("broken YAML", bpr("--config_files=x.yaml"), r"x\.yaml is not valid YAML", replace("/x.yaml", "epochs: [1\n")),
    Case("YAML that is a list", bpr("--config_files=x.yaml"), "expected lines of the form", replace("/x.yaml", "- epochs\n")),
    Case("YAML in UTF-16", bpr("--config_files=x.yaml"), "UTF-8", replace("/x.yaml", "epochs: 1".encode("utf-16"))),
    Case("YAML with code", bpr("--config_files=x.yaml"), "not valid YAML", replace("/x.yaml", "epochs: !!python/object/apply:os.system [true]")),
    Case("YAML with a key twice", bpr("--config_files=x.yaml"), "stands twice", replace("/x.yaml", "seed: 1\nseed: 2\n")),
    Case("YAML nested without end", bpr("--config_files=x.yaml"), "not valid YAML", replace("/x.yaml", "metrics: " + "[" * 3000)),
    Case("YAML that grows a billionfold", bpr("--config_files=x.yaml"), "aliases", replace("/x.yaml", BOMB + "metrics: *j\n")),
    Case("a huge settings file", bpr("--config_files=x.yaml"), "larger than", lambda w: sparse(w.root / "x.yaml", 1 << 40)),
    Case("a settings file that is missing", bpr("--config_files=x.yaml"), "does not exist"),
    Case("a settings file that is a folder", bpr("--config_files=dataset"), "cannot be read"),
    Case("an unknown key in a file", bpr("--config_files=x.yaml"), r"Unknown key 'epoch' from x\.yaml.*epochs", replace("/x.yaml", "epoch: 1\n")),
    Case("an unknown key", bpr("--learning-rat=1"), "Unknown key 'learning_rat'.*learning_rate"),
    Case("a word for a number", bpr("--epochs=many"), "epochs: expected a whole number"),
    Case("a list for a number", bpr("--learning_rate=[1,2]"), "learning_rate"),
    Case("a negative learning rate", bpr("--learning_rate=-1"), "number above 0"),
    Case("NaN as a learning rate", bpr("--learning_rate=nan"), "learning_rate: expected a number"),
    Case("an embedding of size 0", bpr("--embedding_size=0"), "embedding_size.*at least 1"),
    Case("a batch of size 0", bpr("--train_batch_size=0"), "train_batch_size"),
    Case("a key twice", ["--model=BPR", "--seed=1", "--seed=2"], "stands twice"),
    Case("a word without a key", ["--model=BPR", "-seed=1"], "Expected --key=value"),
    Case("an unknown command", ["trian"], "Did you mean train"),
    Case("an unknown model", bpr("--model=LATICE"), "Did you mean LATTICE"),
    Case("an unknown dataset", bpr("--dataset=tinny"), "Did you mean tiny"),
    Case("a dataset out of the folder", bpr("--dataset=../tiny"), "Expected the name of a dataset"),
    Case("an unknown encoder", vbpr("--encoder=clipp"), "Unknown encoder 'clipp'"),
    Case("an unknown metric", bpr("--metrics=Recal"), "Unknown metric 'Recal'"),
    Case("a metric that is not computed", bpr("--valid_metric=NDCG@3"), "valid_metric"),
    Case("lists of length 0", bpr("--topk=0"), "topk"),
    Case("an unknown split", bpr("--eval_args={split: {XX: 1}}"), "XX|split"),
    Case("a split that gives training nothing", bpr("--eval_args={split: {RS: [0, 0.5, 0.5]}}"), "training|split"),
    Case("a split of negative shares", bpr("--eval_args={split: {RS: [0.8, -0.1, 0.3]}}"), "split|RS"),
    Case("eval_args that is no mapping", bpr("--eval_args=full"), "eval_args"),
    Case("a column that is not there", bpr("--load_col={inter: [user_id, item_id, when]}"), "when"),
    Case("an unknown learner", bpr("--learner=adamx"), "Unknown learner 'adamx'"),
    Case("a name of a run that leads out", bpr("--run_name=../r"), "run_name"),
    Case("a run that is there", bpr("--run_name=taken"), "exists already", lambda w: (w.root / "saved/taken").mkdir(parents=True)),
    Case("saving a pickle", bpr("--save_dataset=True"), "pickle"),
    Case("a folder of runs that is a file", bpr("--checkpoint_dir=x"), "cannot be made|exists already", replace("/x", "")),
    Case("a folder of runs nobody can write", bpr("--checkpoint_dir=/proc/x"), "cannot be made"),
    Case("a list of things that are none", ["--list=things"], "models, datasets or encoders"),
]  # fmt: skip

INTERACTIONS = [
    Case("no interactions file", bpr(), r"needs tiny\.inter", lambda w: (w.data / "tiny.inter").unlink()),
    Case("interactions that are a folder", bpr(), r"needs tiny\.inter", lambda w: ((w.data / "tiny.inter").unlink(), (w.data / "tiny.inter").mkdir())),
    Case("an empty interactions file", bpr(), "empty|first line", replace("tiny.inter", "")),
    Case("a first line and no rows", bpr(), r"no interaction", lambda w: w.inter([])),
    Case("a first line without types", bpr(), "name:type|user_id:token", lambda w: w.inter(header="user_id\titem_id\ttimestamp")),
    Case("an unknown type", bpr(), "tokn", lambda w: w.inter(header="user_id:tokn\titem_id:token\ttimestamp:float")),
    Case("no item column", bpr("--load_col={inter: [user_id, timestamp]}"), "item_id", lambda w: w.inter(header="user_id:token\titm:token\ttimestamp:float")),
    Case("a column twice", bpr(), "twice|user_id", lambda w: w.inter(header="user_id:token\tuser_id:token\ttimestamp:float")),
    Case("interactions in Latin-1", bpr(), "UTF-8", lambda w: w.write("tiny.inter", (w.data / "tiny.inter").read_bytes() + "ü1\ti1\t3\n".encode("latin-1"))),
    Case("interactions that are a zip", bpr(), r"tiny\.inter", replace("tiny.inter", b"PK\x03\x04\x00\xff\xfe" * 40)),
    Case("interactions with NUL bytes", bpr(), r"tiny\.inter|timestamp", lambda w: w.write("tiny.inter", (w.data / "tiny.inter").read_bytes() + b"\0\0\0\0\n")),
    Case("a row too long", bpr(), r"tiny.*line \d+|fields", lambda w: w.inter([*w.lines, "u1\ti1\t3\t4\t5\n"])),
    Case("a row too short", bpr(), r"line 77 has 2 fields", lambda w: w.inter([*w.lines, "u1\ti9\n"])),
    Case("a time that is no number", bpr(), "timestamp|yesterday", lambda w: w.inter([*w.lines, "u1\ti9\tyesterday\n"])),
    Case("times that are not there", sasrec("--load_col={inter: [user_id, item_id]}"), "timestamp|time"),
    Case("a filter that leaves nothing", bpr("--user_inter_num_interval=[100,inf)"), "filter|nothing|remain|no interaction"),
    Case("a filter that is none", bpr("--user_inter_num_interval=ten"), "interval"),
    Case("a user with all items", bpr(), "every item|all items", lambda w: w.inter([*w.lines[9:], *(f"u0\ti{i}\t{i}\n" for i in range(ITEMS))])),
    Case("one item", bpr(), "every item|all items", lambda w: w.inter([f"u{u}\ti0\t{time}\n" for u in range(9) for time in range(3)])),
    Case("users with one interaction each", bpr(), "valid|test|evaluat", lambda w: w.inter([f"u{u}\ti{u % 5}\t{u}\n" for u in range(9)])),
    Case("an empty test split", ready(), "test.*no|test.*empty", lambda w: w.ready(test=[])),
    Case("an empty validation split", ready(), "valid.*no|valid.*empty", lambda w: w.ready(valid=[])),
    Case("an empty training split", ready(), "train.*no|train.*empty", lambda w: w.ready(train=[])),
    Case("a ready split that is missing", ready(), r"needs tiny\.valid\.inter", lambda w: w.ready(valid=None)),
    Case("ready splits in a wrong number", ready("--benchmark_filename=[train, test]"), "benchmark_filename", lambda w: w.ready()),
    Case("lists longer than the catalogue", bpr("--topk=99", "--valid_metric=Recall@99"), "topk.*15|15 items"),
]  # fmt: skip

FEATURES = [
    Case("NaN in a feature", vbpr(), r"row 7 \(item 'i7'\)", features(lambda t: put(t, 7, np.nan))),
    Case("an infinite feature", vbpr(), "row 3", features(lambda t: put(t, 3, np.inf))),
    Case("a float64 beyond float32", vbpr(), "row 3", features(lambda t: put(t.astype(np.float64), 3, 1e300))),
    Case("a row too few", vbpr(), "expected 15 feature rows.*got 14", features(lambda t: t[:-1])),
    Case("a row too many", vbpr(), "got 16.*padding", features(lambda t: np.concatenate([t, t[:1]]))),
    Case("no rows", vbpr(), "rows", features(lambda t: t[:0])),
    Case("no columns", vbpr(), "matrix of numbers", features(lambda t: t[:, :0])),
    Case("one axis", vbpr(), "matrix of numbers", features(lambda t: t[:, 0])),
    Case("three axes", vbpr(), "matrix of numbers", features(lambda t: t[:, :, None])),
    Case("texts as features", vbpr(), "matrix of numbers", features(lambda t: t.astype(str))),
    Case("complex features", vbpr(), "matrix of numbers", features(lambda t: t.astype(complex))),
    Case("objects as features", vbpr(), "whole .npy", features(lambda t: np.array([[Evil()]] * ITEMS, dtype=object))),
    Case("a pickle as features", vbpr(), "whole .npy", replace("visual.npy", pickle.dumps(Evil()))),
    Case("an archive as features", vbpr(), "archive", lambda w: (np.savez(w.data / "x.npz", a=w.table), os.replace(w.data / "x.npz", w.data / "visual.npy"))),
    Case("features cut short", vbpr(), "only a part", lambda w: cut(w.data / "visual.npy")),
    Case("an empty feature file", vbpr(), r"0 bytes", replace("visual.npy", b"")),
    Case("a feature file that claims 8 TB", vbpr(), "only a part", header_of_a_huge_table),
    Case("an item twice", vbpr(), "'i0' stands twice, in lines 1 and 16", lambda w: w.write("item_ids.txt", (w.data / "item_ids.txt").read_text() + "i0\n")),
    Case("ids in Latin-1", vbpr(), "UTF-8", replace("item_ids.txt", "ä\n".encode("latin-1") * ITEMS)),
    Case("ids of other items", vbpr(), "not one of", replace("item_ids.txt", "".join(f"x{i}\n" for i in range(ITEMS)))),
    Case("no ids", vbpr(), r"no item_ids\.txt", lambda w: (w.data / "item_ids.txt").unlink()),
    Case("an item without a row", vbpr("--missing_modality=error"), "1 of 15 items have no row.*'i14'", lambda w: (np.save(w.data / "visual.npy", w.table[:14]), w.write("item_ids.txt", "".join(f"i{i}\n" for i in range(14))))),
    Case("two files of one modality", vbpr(), "both hold visual", lambda w: np.save(w.data / "image_feat.npy", w.table)),
    Case("an unknown modality", vbpr("--modalities=visul"), "Unknown modality 'visul'.*visual"),
    Case("a modality twice", vbpr("--modalities=[visual, visual]"), "twice"),
    Case("a feature set that is not there", vbpr("--feature_set=mine"), "no feature set"),
    Case("a feature set out of the dataset", vbpr("--feature_set=../../x"), "feature_set: expected the name"),
    Case("a broken meta.json", vbpr(), r"meta\.json is no JSON", replace("meta.json", "{")),
    Case("a table that meta.json does not describe", vbpr(), "is not the file that", replace("meta.json", json.dumps({"outputs": {"visual": {"sha256": "0" * 64}}}))),
    Case("a meta.json of something else", vbpr(), r"meta\.json", replace("meta.json", json.dumps({"outputs": [1], "missing": 3}))),
    Case("a choice that is none", vbpr("--missing_modality=drop"), "missing_modality"),
]  # fmt: skip

CONTENT = [
    Case("items in Latin-1", extract(), "UTF-8", replace("tiny.item", "item_id:token\ttitle:token_seq\ni1\tü\n".encode("latin-1"))),
    Case("an empty item file", extract("--image_folder=none"), "UTF-8 text|first line", replace("tiny.item", "")),
    Case("an item row too long", extract("--image_folder=none"), r"tiny\.item", lambda w: w.write("tiny.item", "item_id:token\ttitle:token_seq\ni1\ta\ni2\ta\tb\tc\n")),
    Case("neither pictures nor texts", extract("--image_folder=none"), "neither pictures", lambda w: (w.data / "tiny.item").unlink()),
    Case("pictures that nobody can read", extract("--modalities=visual"), "picture", lambda w: [w.write(f"images/i{i}.png", b"no picture") for i in range(4)]),
    Case("a link out of the dataset", extract(), "link out of the dataset", link_out),
    Case("a folder of pictures that leads out", extract(), "leads out of the dataset", folder_link_out),
    Case("a path out as folder of pictures", extract("--image_folder=../.."), "leads out of the dataset"),
    Case("an item name with a blank at its end", extract(), "blank", lambda w: w.write("tiny.item", "item_id:token\ttitle:token_seq\ni1 \ta\n")),
    Case("an encoder that cannot do it", extract("--modalities=acoustic"), "acoustic"),
    Case("an unknown precision", ["extract", "--dataset=tiny", "--encoder=cnn", "--encoder_precision=fp8", "--use_gpu=False", "--pretrained=null"], "encoder_precision|fp8"),
    Case("extract without an encoder", ["extract", "--dataset=tiny"], "encoder"),
    Case("an unknown option of extract", extract("--encodr=x"), "Unknown key 'encodr'|unknown"),
    Case("weights that are not there", ["extract", "--dataset=tiny", "--encoder=clip", "--use_gpu=False", "--pretrained=/none/such.pt"], "/none/such.pt"),
    Case("end to end without an encoder", vbpr("--encoder_training=end2end"), "none is named"),
    Case("end to end without pictures and texts", vbpr("--encoder_training=end2end", "--encoder=classic", "--image_folder=none"), "classic|trained|neither", lambda w: (w.data / "tiny.item").unlink()),
]  # fmt: skip

RUNS = [
    Case("resume of nothing", ["--resume=saved/none"], "no run directory"),
    Case("resume with other settings", ["--resume=saved/r", "--epochs=3"], "its own settings", after_training(lambda w: None)),
    Case("resume of broken settings", ["--resume=saved/r"], "not valid YAML", after_training(lambda w: w.write("/saved/r/settings.yaml", "a: ["))),
    Case("a tampered last.pt", ["--resume=saved/r"], "damaged|checksum", after_training(lambda w: flip(w.root / "saved/r/last.pt"))),
    Case("a last.pt without its optimizer", ["--resume=saved/r"], "last.pt", after_training(without_key("last.pt", "optimizer"))),
    Case("a tampered best.pt", recommend(), "damaged|checksum", after_training(lambda w: flip(w.root / "saved/r/best.pt"))),
    Case("half a checkpoint", recommend(), "only a part", after_training(lambda w: cut(w.root / "saved/r/best.pt"))),
    Case("an empty checkpoint", recommend(), "only a part", after_training(lambda w: w.write("/saved/r/best.pt", b""))),
    Case("a pickle as checkpoint", recommend(), "no checkpoint", after_training(lambda w: w.write("/saved/r/best.pt", pickle.dumps(Evil())))),
    Case("a torch file with code", recommend(), "refused", after_training(lambda w: torch.save({"format": Evil()}, w.root / "saved/r/best.pt"))),
    Case("a torch file of others", recommend(), "no checkpoint of this version", after_training(lambda w: torch.save({"state_dict": {}}, w.root / "saved/r/best.pt"))),
    Case("a torch file that is a list", recommend(), "no checkpoint of this version", after_training(lambda w: torch.save([1], w.root / "saved/r/best.pt"))),
    Case("a checkpoint without weights", recommend(), r"best\.pt", after_training(without_key("best.pt", "state_dict"))),
    Case("a checkpoint without a fingerprint", recommend(), r"best\.pt|data", after_training(without_key("best.pt", "fingerprint"))),
    Case("weights of another model", recommend(), "does not fit", after_training(checkpoint_of_another_model)),
    Case("weights of another shape", recommend(), "does not fit", after_training(other_shape)),
    Case("no checkpoint", recommend(), "does not exist", after_training(lambda w: (w.root / "saved/r/best.pt").unlink())),
    Case("data that have changed", recommend(), "not those the run was trained on", after_training(lambda w: w.inter(w.lines[1:]))),
    Case("data that are gone", recommend(), "Unknown dataset|no folder", after_training(lambda w: shutil.rmtree(w.data))),
    Case("recommendations for nobody", recommend("--users=nobody"), "nobody", after_training(lambda w: None)),
    Case("lists of length -1", recommend("--topk=-1"), "topk", after_training(lambda w: None)),
    Case("a table of unknown kind", recommend("--out=top.xls"), "top.xls|csv", after_training(lambda w: None)),
    Case("a report on nothing", ["report", "nowhere"], "nowhere"),
    Case("a report without folders", ["report"], "at least one folder"),
    Case("a report with -1 users", ["report", "saved/r", "--users=-1"], "--users"),
    Case("a report where nobody can write", ["report", "saved/r", "--out=/proc/x.html", "--users=0"], "/proc|permission|No such", after_training(lambda w: None)),
]  # fmt: skip

COMMANDS = [
    Case("an unknown format", ["convert", "mmrek"], "Did you mean mmrec"),
    Case("a source that is missing", convert("csv", "none.csv"), "there is no none.csv"),
    Case("a target that is there", together(convert("amazon", "r.json"), [])[:4] + ["--out", "dataset/tiny"], "is there already", replace("/r.json", REVIEWS)),
    Case("a target without a name", convert("amazon", "r.json")[:4] + ["--out", "dataset/a b"], "name can be a dataset's", replace("/r.json", REVIEWS)),
    Case("a foreign pickle", convert("diffmm", "src"), "refused: it asks for (posix|nt|os).system", foreign_matrix),
    Case("half a pickle", convert("diffmm", "src"), "only a part", lambda w: (matrices((5, 6), (5, 6), (5, 6))(w), cut(w.root / "src/valMat.pkl"))),
    Case("matrices that do not fit", convert("diffmm", "src"), "differ in shape", matrices((5, 6), (5, 6), (5, 7))),
    Case("a folder without the matrices", convert("diffmm", "src"), "expected the file trnMat.pkl", replace("/src/x", "")),
    Case("a cut gzip", convert("amazon", "r.json.gz"), "damaged or cut short", lambda w: cut(w.write("/r.json.gz", gzip.compress(REVIEWS.encode())))),
    Case("reviews that are none", convert("amazon", "r.json"), "No interaction is left", replace("/r.json", "no\njson\n")),
    Case("an empty source", convert("amazon", "r.json"), "source is empty", replace("/r.json", "")),
    Case("a k-core nobody is in", convert("amazon", "r.json", "--k-core=7"), "No interaction is left of 36", replace("/r.json", REVIEWS)),
    Case("a negative k-core", convert("amazon", "r.json", "--k-core=-1"), "--k-core", replace("/r.json", REVIEWS)),
    Case("a table without the column", convert("csv", "t.csv", "--user=u", "--item=i", "--split=none"), "no column 'i'", replace("/t.csv", "u,item\n1,2\n")),
    Case("a table in Latin-1", convert("csv", "t.csv", "--user=u", "--item=i", "--split=none"), "UTF-8", replace("/t.csv", "u,i\nü,2\n".encode("latin-1"))),
    Case("an empty table", convert("csv", "t.csv", "--user=u", "--item=i", "--split=none"), "at least one row|column names", replace("/t.csv", "")),
    Case("parquet that is none", convert("parquet", "t.parquet", "--user=u", "--item=i", "--split=none"), "[Pp]arquet", replace("/t.parquet", "PAR1")),
    Case("an unknown split for a conversion", convert("amazon", "r.json", "--split=9:1"), "invalid choice|--split", replace("/r.json", REVIEWS)),
    Case("MMRec's folder without its table", convert("mmrec", "src"), "one .inter file", replace("/src/x", "")),
    Case("MMRec's features of two lengths", convert("mmrec", "src"), "differ in rows", lambda w: (w.write("/src/a.inter", "userID\titemID\tx_label\n1\t2\t0\n"), np.save(w.root / "src/image_feat.npy", w.table), np.save(w.root / "src/text_feat.npy", w.table[:3]))),
    Case("VIP5's folder without its maps", convert("vip5", "src"), "datamaps.json", replace("/src/x", "")),
    Case("VIP5's maps that are none", convert("vip5", "src"), "user2id", lambda w: (w.write("/src/datamaps.json", "[1]"), w.write("/src/sequential_data.txt", "1 2\n"))),
    Case("PerPEFT's folder without its files", convert("perpeft", "src"), "expected", replace("/src/x", "")),
    Case("atomic files without types", convert("recbole", "src"), "name:type", replace("/src/a.inter", "user_id\titem_id\n1\t2\n")),
    Case("pictures of a dataset without a list", ["convert", "pictures", "--src", "dataset/tiny"], "images.csv"),
    Case("describe nothing", ["describe", "--dataset=none"], "Unknown dataset 'none'"),
    Case("describe a file that is no table", ["describe", "--dataset=tiny"], r"tiny\.inter", replace("tiny.inter", b"\xff\xfe\x00")),
    Case("describe items that are no table", ["describe", "--dataset=tiny"], r"tiny\.item", replace("tiny.item", b"\xff\xfe\x00")),
    Case("describe rows too long", ["describe", "--dataset=tiny"], r"tiny\.inter", lambda w: w.inter([*w.lines, "u1\ti1\t3\t4\n"])),
    Case("a shop without users", ["synthetic", "--out", "dataset/big", "--users", "0"], "users"),
    Case("a search space that is missing", ["search", "--model=BPR", "--dataset=tiny", "--params-file=x.yaml"], r"x\.yaml"),
    Case("a broken search space", ["search", "--model=BPR", "--dataset=tiny", "--params-file=x.yaml"], r"x\.yaml", replace("/x.yaml", "a: [")),
    Case("an empty search space", ["search", "--model=BPR", "--dataset=tiny", "--params-file=x.yaml"], r"x\.yaml", replace("/x.yaml", "")),
    Case("an unknown key to search", ["search", "--model=BPR", "--dataset=tiny", "--params-file=x.yaml"], "learning_rat", replace("/x.yaml", "learning_rat: [0.1]\n")),
    Case("a range upside down", ["search", "--model=BPR", "--dataset=tiny", "--params-file=x.yaml"], "learning_rate", replace("/x.yaml", "learning_rate: {type: float, low: 1.0, high: 0.1}\n")),
    Case("a search of no trials", ["search", "--model=BPR", "--dataset=tiny", "--trials=0", "--params-file=x.yaml"], "--trials", replace("/x.yaml", "learning_rate: [0.1]\n")),
    Case("an unknown strategy", ["search", "--model=BPR", "--dataset=tiny", "--strategy=luck", "--params-file=x.yaml"], "--strategy", replace("/x.yaml", "learning_rate: [0.1]\n")),
    Case("a database that is none", ["search", "--model=BPR", "--dataset=tiny", "--storage=nosql://x", "--params-file=x.yaml"], "cannot be opened", replace("/x.yaml", "learning_rate: [0.1]\n")),
    Case("an unknown benchmark", ["benchmark", "shopp"], "There is no benchmark file shopp"),
    Case("a broken benchmark", ["benchmark", "x.yaml"], "not valid YAML", replace("/x.yaml", "models: [")),
    Case("a benchmark of no models", ["benchmark", "x.yaml"], "models", replace("/x.yaml", "name: x\n")),
    Case("a benchmark of unknown models", ["benchmark", "--models=NoSuch", "--datasets=tiny"], "NoSuch"),
    Case("fine-tuning without an encoder", ["finetune", "--dataset=tiny"], "encoder"),
    Case("fine-tuning of what cannot be trained", ["finetune", "--dataset=tiny", "--encoder=classic", "--use_gpu=False"], "classic"),
    Case("an explanation by a model without words", ["explain", "--run=saved/r", "--user=u1", "--item=i1"], "VIP5", after_training(lambda w: None)),
]  # fmt: skip

CATALOGUE = SETTINGS + INTERACTIONS + FEATURES + CONTENT + RUNS + COMMANDS


#: what a run leaves that fails after it has begun: its settings, and a record that says why
RECORD = re.compile(r"saved/(r|x)/(settings\.yaml|given\.yaml|result\.json|run\.log)$")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return World(tmp_path)


def test_the_catalogue_is_one():
    names = [case.name for case in CATALOGUE]
    assert len(names) >= 60 and len(set(names)) == len(names)


@pytest.mark.parametrize("case", CATALOGUE, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_input(case, world, capsys):
    case.prepare(world)
    before = world.listing()
    capsys.readouterr()
    code = cli.main(case.words)
    check_refusal(code, capsys.readouterr().err, case.says)
    after = world.listing()
    assert {name: size for name, size in after.items() if name in before or not RECORD.match(name)} == before, (
        "something was written or changed"
    )
    check_whole(world.root, set(before))
    assert not (world.root / "owned").exists(), "foreign code has run"
