"""What the machine does to a run: a full disk, folders that cannot be written, full memory, two programs at once; and small data that are legal."""

import builtins
import errno
import json
import os
import resource
import stat
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from recbole_mm import cli
from recbole_mm.record import new_run_dir
from tests.robustness.test_catalogue import REVIEWS, bpr, convert, extract, ready, recommend, sasrec, together, vbpr
from tests.robustness.test_catalogue import bomb as picture_bomb
from tests.robustness.test_catalogue import world as world  # the fixture
from tests.robustness.world import ITEMS, check_refusal, check_whole

DISK = "disk|File too large|[Nn]o space|cannot be written"


@contextmanager
def files_no_larger_than(size: int):
    """Every write beyond `size` bytes of a file fails as on a full disk (RLIMIT_FSIZE; Python ignores the signal that goes with it)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


COMMANDS = {
    "train": bpr(),
    "train with a log": bpr("--state=debug"),
    "extract": extract("--overwrite=true"),
    "convert": convert("amazon", "r.json"),
    "synthetic": ["synthetic", "--out", "dataset/big", "--users", "30", "--items", "60", "--interactions", "400", "--no-pictures"],
    "describe": ["describe", "--dataset=tiny"],
    "recommend": recommend("--run=saved/done"),
    "report": ["report", "saved/done", "--out=report.html", "--users=2"],
    "search": ["search", *together(bpr(), ["--params-file=space.yaml", "--trials=2"])],
}  # fmt: skip
COMMANDS["search"] = [word for word in COMMANDS["search"] if "run_name" not in word]


@pytest.mark.parametrize("size", [0, 300, 2500])
@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk(name, size, world, capsys):
    """One paragraph, nothing half-written, and the same command works when there is room again."""
    words = COMMANDS[name]
    world.write("/r.json", REVIEWS)
    world.write("/space.yaml", "learning_rate: [0.1, 0.01]\n")
    if name in ("recommend", "report"):
        assert cli.main(bpr("--run_name=done")) == 0
    before = world.listing()
    capsys.readouterr()
    with files_no_larger_than(size):
        code = cli.main(words)
    err = capsys.readouterr().err
    after = world.listing()
    kept = {name: length for name, length in after.items() if not name.startswith(("saved/r/", "saved/search", "log_"))}
    if code == 0:  # its files are smaller than the room there is
        check_whole(world.root, set(before))
        return
    check_refusal(code, err, DISK)
    assert kept == before, "something was written or changed"
    check_whole(world.root, set(before))
    again = [word.replace("run_name=r", "run_name=again") for word in words]
    assert cli.main(again) == 0, capsys.readouterr().err


def test_a_full_disk_leaves_the_older_checkpoint(world, capsys):
    """The disk fills up in the middle of a run: what was saved before stays whole, and the run goes on from there."""
    save = torch.save
    calls = []

    def full(value, path, *rest):
        calls.append(path)
        if len(calls) > 4:
            with open(path, "wb") as stream:
                stream.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(value, path, *rest)

    words = bpr("--epochs=5", "--checkpoint_seconds=0")
    torch.save = full
    try:
        code = cli.main(words)
    finally:
        torch.save = save
    check_refusal(code, capsys.readouterr().err, "No space left on device.*disk")
    check_whole(world.root, set())
    assert cli.main(["--resume=saved/r"]) == 0
    assert cli.main([word.replace("run_name=r", "run_name=whole") for word in words]) == 0
    broken, whole = (json.loads((world.root / "saved" / name / "result.json").read_text()) for name in ("r", "whole"))
    assert broken["test"] == whole["test"] and [e["train_loss"] for e in broken["epochs"]] == [e["train_loss"] for e in whole["epochs"]]


@contextmanager
def read_only(monkeypatch, folder):
    """As for a user who may not write below `folder`; the tests run as root as a rule, whom permissions do not stop."""
    real_open, real_mkdir, real_replace, real_osopen = builtins.open, os.mkdir, os.replace, os.open

    def check(path):
        if str(path).startswith(str(folder)) or not os.path.isabs(path) and str(os.path.abspath(path)).startswith(str(folder)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def guarded_open(file, mode="r", *rest, **keywords):
        if isinstance(file, (str, os.PathLike)) and set(mode) & set("wax+"):
            check(os.fspath(file))
        return real_open(file, mode, *rest, **keywords)

    def guarded_mkdir(path, *rest, **keywords):
        if not os.path.isdir(path):
            check(path)
        return real_mkdir(path, *rest, **keywords)

    def guarded_osopen(path, flags, *rest, **keywords):
        if flags & (os.O_WRONLY | os.O_RDWR):
            check(path)
        return real_osopen(path, flags, *rest, **keywords)

    def guarded_replace(source, target, *rest, **keywords):
        check(target)
        return real_replace(source, target, *rest, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", guarded_open)
        patch.setattr("io.open", guarded_open)
        patch.setattr(os, "mkdir", guarded_mkdir)
        patch.setattr(os, "open", guarded_osopen)
        patch.setattr(os, "replace", guarded_replace)
        yield


@pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib of Python 3.10 keeps references of its own to what is patched here")
@pytest.mark.parametrize(
    "words, says",
    [
        (bpr(), "cannot be made.*checkpoint_dir"),
        (convert("amazon", "r.json"), "[Pp]ermission denied"),
        (["synthetic", "--out", "dataset/big", "--users", "30", "--items", "60", "--interactions", "400", "--no-pictures"], "[Pp]ermission denied"),
        (["search", "--model=BPR", "--dataset=tiny", "--params-file=space.yaml", "--trials=1"], "[Pp]ermission denied|cannot be opened"),
    ],
    ids=["train", "convert", "synthetic", "search"],
)  # fmt: skip
def test_read_only_folder(words, says, world, monkeypatch, capsys):
    world.write("/r.json", REVIEWS)
    world.write("/space.yaml", "learning_rate: [0.1, 0.01]\n")
    before = world.listing()
    with read_only(monkeypatch, world.root):
        code = cli.main(words)
    check_refusal(code, capsys.readouterr().err, says)
    assert world.listing() == before


def test_a_read_only_dataset_is_trained_on_all_the_same(world):
    """Features that are made on the way go to the user's cache; root, whom the mode does not stop, writes nothing there either."""
    world.without_features()
    for folder in (world.data, world.data / "images"):
        folder.chmod(0o555)
    before = world.listing()
    try:
        assert cli.main(vbpr("--encoder=classic")) == 0
        assert cli.main(["describe", "--dataset=tiny"]) == 0
    finally:
        for folder in (world.data, world.data / "images"):
            folder.chmod(0o755)
    changed = {name for name, size in world.listing().items() if before.get(name) != size and not name.startswith(("saved", "log_"))}
    assert changed and all(name.startswith("cache/recbole_mm/tiny-") for name in changed), changed


@pytest.mark.parametrize(
    "error, says",
    [
        (MemoryError(), "memory of the machine is full.*train_batch_size.*--resume"),
        (np._core._exceptions._ArrayMemoryError((10**9, 10**6), np.dtype("f4")), "memory of the machine is full.*Unable to allocate"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory of the machine"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), "memory of the GPU is full.*CUDA out of memory.*amp"),
    ],
    ids=["python", "numpy", "torch", "cuda"],
)  # fmt: skip
def test_full_memory_names_what_to_make_smaller(error, says, world, monkeypatch, capsys):
    def calculate_loss(self, interaction):
        raise error

    monkeypatch.setattr("recbole.model.general_recommender.bpr.BPR.calculate_loss", calculate_loss)
    check_refusal(cli.main(bpr()), capsys.readouterr().err, says)
    check_whole(world.root, set())
    assert json.loads((world.root / "saved/r/result.json").read_text())["status"] == "failed"


def test_real_memory_that_is_not_there(world, capsys):
    """An embedding of 4 TB is refused by the machine, not by us."""
    check_refusal(cli.main(bpr("--embedding_size=100000000000")), capsys.readouterr().err, "memory of the machine is full")


def test_a_bug_of_ours_is_not_called_wrong_input(world, monkeypatch):
    monkeypatch.setattr("recbole.model.general_recommender.bpr.BPR.calculate_loss", lambda self, interaction: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(bpr())


def test_runs_that_start_in_the_same_second(world, monkeypatch):
    """Twenty at once, with a clock that stands still: twenty folders. Those with the same name of the user's: one gets it."""
    monkeypatch.setattr("time.strftime", lambda *words: "20260101-000000")
    made, refused = [], []

    def start(name):
        try:
            made.append(new_run_dir(world.root / "saved", name, "BPR-tiny"))
        except ValueError as error:
            refused.append(str(error))

    for name in (None, "mine"):
        threads = [threading.Thread(target=start, args=(name,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(made)) == len(made) == 21
    assert len(refused) == 19 and all("exists already" in text for text in refused)


def test_a_name_taken_in_the_same_second_is_another(world, monkeypatch):
    drawn = iter(["aa", "aa", "bb"])
    monkeypatch.setattr("recbole_mm.record.secrets.token_hex", lambda n: next(drawn))
    monkeypatch.setattr("time.strftime", lambda *words: "20260101-000000")
    names = [new_run_dir(world.root / "saved", None, "x").name for _ in range(2)]
    assert names == ["x-20260101-000000-aa", "x-20260101-000000-bb"]


# small, odd and legal


def one_interaction_each(world):
    world.inter([f"u{u}\ti{u % 5}\t{u}\n" for u in range(9)])


def all_in_training(world):
    world.inter([f"u{u}\ti{i}\t{i}\n" for u in range(4) for i in range(12)])


LEGAL = {
    "an empty settings file": (bpr("--config_files=x.yaml"), lambda w: w.write("/x.yaml", "")),
    "a settings file with a mark of byte order": (bpr("--config_files=x.yaml"), lambda w: w.write("/x.yaml", b"\xef\xbb\xbfseed: 3\n")),
    "one user": (bpr(), lambda w: w.inter([line for line in w.lines if line.startswith("u1\t")] + ["u0\ti14\t1\n"] * 0 + [f"u1\ti{i}\t99\n" for i in (0,)])),
    "two items": (bpr("--topk=1", "--valid_metric=Recall@1", "--eval_args={split: {RS: [1, 1, 1]}, order: RO, group_by: none, mode: full}"), lambda w: w.inter([f"u{u}\ti{u % 2}\t{u}\n" for u in range(30)])),
    "users with one interaction each, split at random": (bpr("--eval_args={split: {RS: [5, 2, 2]}, order: RO, group_by: none, mode: full}"), one_interaction_each),
    "no validation on purpose": (bpr("--eval_args={split: {LS: test_only}, order: TO, mode: full}"), lambda w: None),
    "no test on purpose": (bpr("--eval_args={split: {LS: valid_only}, order: TO, mode: full}"), lambda w: None),
    "no epoch": (bpr("--epochs=0"), lambda w: None),
    "interactions twice": (bpr(), lambda w: w.inter(w.lines + w.lines)),
    "interactions with Windows line ends": (bpr(), lambda w: w.write("tiny.inter", (w.data / "tiny.inter").read_bytes().replace(b"\n", b"\r\n"))),
    "blank lines at the end": (bpr(), lambda w: w.inter([*w.lines, "\n", "\n"])),
    "names in other scripts": (bpr(), lambda w: w.inter([line.replace("u1\t", "ユーザー\t").replace("i3\t", "čaj ☕\t") for line in w.lines])),
    "a row without a user": (bpr(), lambda w: w.inter([*w.lines, "\ti9\t3\n"])),
    "a row without an item": (bpr(), lambda w: w.inter([*w.lines, "u1\t\t3\n"])),
    "items twice in the item file": (vbpr("--encoder=classic"), lambda w: (w.without_features(), w.write("tiny.item", (w.data / "tiny.item").read_text() + "i1\tsomething else\n"))),
    "items that nobody bought": (vbpr("--encoder=classic"), lambda w: (w.without_features(), w.write("tiny.item", (w.data / "tiny.item").read_text() + "".join(f"x{i}\tthing\n" for i in range(50))))),
    "more feature rows than items": (vbpr(), lambda w: (np.save(w.data / "visual.npy", np.tile(w.table, (3, 1))), w.write("item_ids.txt", "".join(f"{p}i{i}\n" for p in ("", "x", "y") for i in range(ITEMS))))),
    "features of one column": (vbpr(), lambda w: np.save(w.data / "visual.npy", w.table[:, :1])),
    "features that are all equal": (vbpr(), lambda w: np.save(w.data / "visual.npy", np.ones_like(w.table))),
    "float16 features": (vbpr(), lambda w: np.save(w.data / "visual.npy", w.table.astype(np.float16))),
    "one broken picture of four": (vbpr("--encoder=classic"), lambda w: (w.without_features(), w.write("images/i2.png", b"no picture"))),
    "a picture bomb": (vbpr("--encoder=classic"), lambda w: (w.without_features(), picture_bomb(w.data / "images" / "i2.png"))),
    "names that lead out": (vbpr("--encoder=classic"), lambda w: (w.without_features(), w.inter([line.replace("i3\t", "../../../etc/passwd\t") for line in w.lines]), w.write("/etc/passwd.png", b"secret"))),
    "an empty sequence file column": (sasrec(), lambda w: None),
    "ready splits": (ready(), lambda w: w.ready()),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_legal(name, world, capsys):
    words, prepare = LEGAL[name]
    prepare(world)
    assert cli.main(words) == 0, capsys.readouterr().err
    record = json.loads((world.root / "saved/r/result.json").read_text())
    assert record["status"] == "finished" and (record["test"] or "no test" in name)
    check_whole(world.root, {name for name in world.listing() if name.startswith("dataset")})


def test_pictures_that_cannot_be_read_are_named(world):
    """A broken picture and a bomb cost their items the picture, not the run; meta.json says why."""
    world.without_features()
    world.write("images/i2.png", b"no picture")
    picture_bomb(world.data / "images" / "i3.png")
    assert cli.main(extract()) == 0
    meta = json.loads((world.data / "features" / "classic" / "meta.json").read_text())
    assert set(meta["broken"]["visual"]) == {"i2", "i3"} and "pixels" in meta["broken"]["visual"]["i3"]


def test_nothing_outside_the_dataset_is_read(world, monkeypatch):
    """An item called like a path finds no picture, although a file of that name is there."""
    from recbole_mm.data.content import ItemContent

    (world.root / "dataset" / "secret.png").write_bytes((world.data / "images" / "i1.png").read_bytes())
    content = ItemContent(world.data, ["[PAD]", "../../secret", "../images/i1", "i1", "/etc/passwd"])
    assert [content.image_path(item) is not None for item in range(5)] == [False, False, False, True, False]


def test_a_report_lists_a_broken_result(world, capsys):
    run = world.trained()
    (run / "result.json").write_text("{")
    assert cli.main(["report", "saved", "--out=x.html", "--users=0"]) == 0
    assert "result.json is broken" in (world.root / "x.html").read_text()


def test_checkpoints_are_not_open_to_others_than_the_rest_is(world):
    """Atomic writing must not leave files with the narrow mode of temporary ones."""
    run = world.trained()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in run.iterdir() if path.is_file() and path.name != "run.log"}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}
