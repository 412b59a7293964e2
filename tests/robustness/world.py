"""A tiny dataset that every bad input starts from, and what a refusal must look like."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from recbole_mm import cli

USERS, ITEMS = 12, 15
#: settings that make a run on the tiny dataset a matter of a fraction of a second
QUICK = [
    "--dataset=tiny", "--use_gpu=False", "--show_progress=False", "--tensorboard=False", "--state=error", "--epochs=1", "--topk=3",
    "--metrics=Recall", "--valid_metric=Recall@3", "--embedding_size=4", "--load_col={inter: [user_id, item_id, timestamp]}",
    "--eval_args={split: {LS: valid_and_test}, order: TO, mode: full}", "--run_name=r",
]  # fmt: skip
#: the same for ready splits
READY = [*[word for word in QUICK if not word.startswith("--eval_args")], "--benchmark_filename=[train, valid, test]"]


class World:
    """A folder to work in with ``dataset/tiny``: 12 users, 15 items, features, texts and pictures."""

    def __init__(self, root: Path):
        self.root = root
        self.data = root / "dataset" / "tiny"
        (self.data / "images").mkdir(parents=True)
        draw = np.random.default_rng(0)
        self.lines = [
            f"u{user}\ti{item}\t{when}\n"
            for user in range(USERS)
            for when, item in enumerate(draw.choice(ITEMS, size=6, replace=False).tolist())
        ]
        self.lines += [f"u0\ti{item}\t{100 + item}\n" for item in range(ITEMS) if f"u0\ti{item}\t" not in "".join(self.lines[:6])][:3]
        self.inter()
        self.items = [f"i{item}" for item in range(ITEMS)]
        self.write("tiny.item", "item_id:token\ttitle:token_seq\n" + "".join(f"{token}\tthing {token}\n" for token in self.items))
        self.table = draw.normal(size=(ITEMS, 5)).astype(np.float32)
        np.save(self.data / "visual.npy", self.table)
        self.write("item_ids.txt", "".join(f"{token}\n" for token in self.items))
        for number, token in enumerate(self.items[:4]):
            Image.new("RGB", (9, 9), (60 * number, 10, 200)).save(self.data / "images" / f"{token}.png")

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file of the dataset, or, with a path that begins with ``/``, of the folder."""
        path = self.root / name[1:] if name.startswith("/") else self.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def inter(self, lines: list[str] | None = None, header: str = "user_id:token\titem_id:token\ttimestamp:float") -> None:
        self.write("tiny.inter", header + "\n" + "".join(self.lines if lines is None else lines))

    def ready(self, **parts: list[str]) -> None:
        """Ready splits instead of tiny.inter; a part that is not given gets some of the rows, None leaves its file away."""
        (self.data / "tiny.inter").unlink()
        default = {"train": self.lines[:50], "valid": self.lines[50:60], "test": self.lines[60:]}
        for part, lines in {**default, **parts}.items():
            if lines is not None:
                self.write(f"tiny.{part}.inter", "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(lines))

    def without_features(self) -> None:
        for name in ("visual.npy", "item_ids.txt"):
            (self.data / name).unlink()

    def trained(self) -> Path:
        """A finished run of BPR in saved/r."""
        assert cli.main(["--model=BPR", *QUICK]) == 0
        return self.root / "saved" / "r"

    def listing(self) -> dict[str, int]:
        """Files below the folder and their sizes; the log of a run may grow."""
        found = (path for path in self.root.rglob("*") if path.is_file() and not path.is_symlink())
        return {str(path.relative_to(self.root)): path.stat().st_size for path in found if path.suffix != ".log"}


def check_refusal(code: int, err: str, says: str) -> None:
    """One clear paragraph on stderr, exit code 2, no traceback."""
    assert code == 2, f"exit code {code}\n{err}"
    assert "Traceback" not in err
    paragraph = err[err.rindex("\nrecbole-mm") if "\nrecbole-mm" in err else err.find("recbole-mm") :].strip()
    assert len(paragraph.splitlines()) == 1, f"more than one paragraph:\n{err}"
    assert len(paragraph) < 1200, f"{len(paragraph)} characters: {paragraph[:1500]}"
    assert re.search(says, paragraph), f"expected {says!r} in: {paragraph}"


def check_whole(root: Path, but: set[str]) -> None:
    """Every file that is there, except for the bad inputs `but`, is whole, and no temporary file is left."""
    for path in root.rglob("*"):
        if not path.is_file():
            continue
        assert not re.search(r"\.partial|\.new-|\.old", path.name), f"left behind: {path}"
        assert not (path.name.startswith(".") and not path.name.endswith(".lock")), f"left behind: {path}"
        if str(path.relative_to(root)) in but:
            continue
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".npz"):
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
