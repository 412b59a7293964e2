"""kill -9 at random moments of training, extraction, fine-tuning, search and conversion; what resumes must end with the unbroken job's numbers.

    python benchmarks/kills.py [--kills 50] [--seed 1] [--kinds training,search] [--work FOLDER] [--out benchmarks/results]

Every job is run once without a break. Then, for each of the kills, a process begins the job afresh, is killed by the system after a time
drawn between 0 and what the unbroken job took, and the job is resumed the way the documentation says: `--resume=<run directory>` for
training and fine-tuning, the same command again for the others. One resumed process in three is killed too. The outcome is compared to
the unbroken one: metrics, losses, per-user values, weights, feature files, trials and converted files, to the last bit. Finished kills
are remembered in `kills.json` beside the table, so the script itself may be interrupted.

Processes are forked from one that has the libraries loaded, so that the kills fall into the work and not into five seconds of imports.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# after the lines above: numpy reads the number of threads when it is imported, and the package may lie in this checkout only
import numpy as np  # noqa: E402
import torch  # noqa: E402

from recbole_mm import cli  # noqa: E402
from recbole_mm.files import write_json, write_text  # noqa: E402

SIZES = "{joint_width: 16, width: 32, layers: 2, heads: 2, patch_size: 8, image_size: 16, text_width: 16, text_layers: 2, text_heads: 2, context: 12}"
CLIP = ["--encoder=clip", "--encoder_library=open_clip", f"--encoder_sizes={SIZES}", "--pretrained=null"]
QUICK = [
    "--dataset=kiosk", "--use_gpu=False", "--show_progress=False", "--tensorboard=False", "--state=error", "--topk=5", "--valid_metric=Recall@5",
    "--embedding_size=16", "--train_batch_size=256", "--learning_rate=0.01", "--load_col={inter: [user_id, item_id, timestamp]}",
    "--eval_args={split: {LS: valid_and_test}, order: TO, mode: full}",
]  # fmt: skip
EACH_EPOCH = "--checkpoint_seconds=0"  # else one in ten seconds, and most of these jobs would begin again
SMALL_SEQUENCES = ["--hidden_size=16", "--inner_size=16", "--n_layers=1", "--n_heads=2", "--MAX_ITEM_LIST_LENGTH=10"]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def files_below(folder: Path, but=()) -> dict[str, str]:
    """Hash of every file below `folder`; .npy by their content."""
    return {str(p.relative_to(folder)): sha(p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in but}


def tensors(path: Path) -> str:
    """Hash of the weights in a checkpoint."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return sha(b"".join(name.encode() + value.contiguous().numpy().tobytes() for name, value in sorted(state.items())))


def of_run(folder: Path) -> dict:
    """What a training run came to."""
    record = json.loads((folder / "result.json").read_text())
    with np.load(folder / "per_user.npz") as arrays:
        users = {key: sha(arrays[key].tobytes()) for key in arrays.files}
    epochs = [{key: value for key, value in epoch.items() if key != "time_s"} for epoch in record["epochs"]]
    kept = {key: record[key] for key in ("status", "test", "test_groups", "valid", "best_epoch", "best_valid_score")}
    return {**kept, "epochs": epochs, "users": users, "weights": tensors(folder / "best.pt")}


def of_search(folder: Path) -> dict:
    """What a search came to: each point's value, the winner, its test."""
    import csv

    with open(folder / "trials.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["state"] == "complete"]
    names = ("kind", "value", "best_epoch", "learning_rate", "reg_weight")
    result = json.loads((folder / "result.json").read_text())
    trials = sorted([row.get(name, "") for name in names] for row in rows)
    return {"trials": trials, **{key: result[key] for key in ("best_settings", "best_value", "valid", "test")}}


def of_conversion(folder: Path) -> dict:
    """What was read, written and dropped."""
    about = json.loads((folder / "dataset/new/convert.json").read_text())
    return {key: value for key, value in about.items() if key != "command"}


def of_finetuning(folder: Path) -> dict:
    """Weights and the features made with them."""
    history = json.loads((folder / "tuned" / "finetune.json").read_text())
    losses = [
        {key: value for key, value in entry.items() if key != "time_s"} for entry in history.get("epochs") or history.get("history") or []
    ]
    features = files_below(folder / "dataset" / "kiosk" / "features", but=("meta.json",))
    return {"losses": losses, "weights": files_below(folder / "tuned" / "encoder", but=("meta.json",)), "features": features}


@dataclass
class Job:
    """Something to kill.

    Attributes:
        kind: training, extraction ...
        name: for the table.
        words: the command line.
        again: the folder of the job -> the command line that resumes it.
        outcome: the folder of the job -> everything that must be equal.
    """

    kind: str
    name: str
    words: list[str]
    outcome: Callable[[Path], dict]
    again: Callable[[Path], list[str]] | None = None
    unbroken: dict = field(default_factory=dict)
    seconds: float = 0.0

    def resume(self, folder: Path) -> list[str]:
        return self.words if self.again is None else self.again(folder)


def run_of(folder: Path) -> Path:
    """The run directory of a job's last beginning."""
    return max([folder / "saved/r", *(folder / "saved").glob("r*")], key=lambda path: len(path.name))


def training(name: str, *words: str) -> Job:
    command = [f"--model={name.partition(',')[0]}", *QUICK, *words, "--run_name=r"]

    def again(folder: Path) -> list[str]:
        last = run_of(folder)
        if (last / "settings.yaml").is_file():
            return [f"--resume={last.relative_to(folder)}"]
        return [*command[:-1], f"--run_name={'r' if not last.is_dir() else last.name + 'r'}"]  # killed before there was anything to resume

    def outcome(folder: Path) -> dict:
        return of_run(run_of(folder))

    return Job("training", name, command, outcome, again)


def finetuning() -> Job:
    keys = {"epochs": 6, "batch_size": 16, "micro_batch": 8, "valid_share": 0.2, "patience": 9, "learning_rate": 0.003}
    settings = [f"--finetune_{key}={value}" for key, value in keys.items()]
    command = ["finetune", "--dataset=kiosk", *CLIP, "--use_gpu=False", "--encoder_workers=0", *settings, "--output=tuned"]

    def again(folder: Path) -> list[str]:
        return ["finetune", "--resume=tuned"] if (folder / "tuned/last.pt").is_file() else command

    return Job("fine-tuning", "CLIP (tiny, random weights)", command, of_finetuning, again)


def jobs() -> list[Job]:
    """All jobs; each takes a second or a few."""
    search = ["search", "--model=VBPR", *QUICK, "--epochs=4", "--params-file=space.yaml", "--heartbeat=1", "--out=found"]
    extraction = ["extract", "--dataset=kiosk", "--use_gpu=False", "--encoder_workers=0"]
    reviews = ["convert", "amazon", "--src", "reviews.json.gz", "--out", "dataset/new", "--no-progress"]

    def sets(folder: Path) -> dict[str, str]:
        return files_below(folder / "dataset/kiosk/features", but=("meta.json",))

    def new(folder: Path) -> dict:
        return {**files_below(folder / "dataset/new", but=("convert.json",)), "counts": of_conversion(folder)}

    def overwrite(words: list[str]):
        """It may have been killed after its last step, and then asks whether to overwrite."""
        return lambda folder: [*words, "--overwrite"]

    return [
        training("BPR", "--epochs=30", EACH_EPOCH),
        training("VBPR", "--epochs=25", "--encoder=classic", EACH_EPOCH),
        training("LATTICE", "--epochs=8", "--encoder=classic", EACH_EPOCH),
        training("MMGCL", "--epochs=8", "--encoder=classic", "--modalities=visual,textual", EACH_EPOCH),
        training("SASRec", "--epochs=8", *SMALL_SEQUENCES, EACH_EPOCH),
        training("VBPR, end to end", "--epochs=3", "--encoder_training=end2end", *CLIP, EACH_EPOCH),
        training("LightGCN, a checkpoint each second", "--epochs=40", "--checkpoint_seconds=1"),
        Job("extraction", "classic", [*extraction, "--encoder=classic"], sets),
        Job("extraction", "CLIP (tiny, random weights)", [*extraction, *CLIP, "--encoder_batch_size=8"], sets),
        finetuning(),
        Job("search", "VBPR, grid of 6 and the defaults", [*search, "--strategy=grid"], lambda folder: of_search(folder / "found")),
        Job("conversion", "Amazon reviews, 5-core", reviews, new, overwrite(reviews)),
        Job("conversion", "Amazon reviews, 8:1:1", [*reviews, "--split=8:1:1"], new, overwrite([*reviews, "--split=8:1:1"])),
    ]  # fmt: skip


def prepare(folder: Path, reviews: int = 40_000) -> None:
    """The inputs of all jobs: a shop of 80 items with pictures and texts and their features, reviews to convert, a search space."""
    from benchmarks.convert_memory import write_reviews

    folder.mkdir(parents=True)
    write_reviews(folder / "reviews.json.gz", reviews)
    write_text(folder / "space.yaml", "learning_rate: [0.1, 0.01]\nreg_weight: [0.0, 0.01, 0.1]\n")
    here = os.getcwd()
    os.chdir(folder)
    try:
        words = ["synthetic", "--out", "dataset/kiosk", "--users", "150", "--items", "80", "--interactions", "2400"]
        assert cli.main(words) == 0
        extract = ["extract", "--dataset=kiosk", "--use_gpu=False", "--encoder_workers=0"]
        assert (
            cli.main([*extract, *CLIP]) == 0
        )  # for its libraries' sake; only a forward pass, autograd's threads would not survive the fork
        shutil.rmtree("dataset/kiosk/features")
        assert cli.main([*extract, "--encoder=classic"]) == 0
    finally:
        os.chdir(here)


def fresh(source: Path, folder: Path, job: Job) -> None:
    """A folder of its own for one try of a job."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    if job.kind in ("extraction", "fine-tuning"):
        shutil.rmtree(folder / "dataset/kiosk/features")


def start(folder: Path, words: list[str]) -> int:
    """Fork a process that runs `words` in `folder`; return its number."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        import recbole_mm.encoder.extract as extraction

        extraction.PART = 16  # so that there is something to lose
        print(f"\n> {' '.join(words)}", flush=True)
        code = cli.main(words)
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def wait(number: int, seconds: float | None) -> int | None:
    """Exit code of a process, or None where it was killed after `seconds`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            return None
        time.sleep(0.001)


def unbroken(source: Path, work: Path, job: Job) -> None:
    """Run the job once to its end and keep its outcome and time."""
    folder = work / "unbroken"
    fresh(source, folder, job)
    begin = time.perf_counter()
    code = wait(start(folder, job.words), None)
    if code != 0:
        raise SystemExit(f"{job.kind}, {job.name}: the unbroken job fails:\n{(folder / 'log.txt').read_text()[-2000:]}")
    job.seconds = time.perf_counter() - begin
    job.unbroken = job.outcome(folder)


def what_is_there(folder: Path, job: Job) -> str:
    """How far the killed process had come, for the table."""
    if job.kind == "training":
        run = run_of(folder)
        if not (run / "settings.yaml").is_file():
            return "nothing"
        if not (run / "last.pt").is_file():
            return "settings"
        try:
            return f"epoch {torch.load(run / 'last.pt', weights_only=True)['epoch']}"
        except Exception as error:  # torch.load raises what the broken byte happens to cause
            return f"last.pt is not whole ({type(error).__name__})"
    if job.kind == "fine-tuning":
        if (folder / "tuned/encoder").exists():
            return "weights"
        return (
            f"epoch {torch.load(folder / 'tuned/last.pt', weights_only=True).get('epoch')}"
            if (folder / "tuned/last.pt").is_file()
            else "nothing"
        )
    if job.kind == "extraction":
        parts = len(list((folder / "dataset/kiosk").glob("features/.*.partial/*.npy")))
        whole = [path.name for path in (folder / "dataset/kiosk").glob("features/[!.]*")]
        return "the set" if whole else f"{parts} parts"
    if job.kind == "search":
        return f"{len(list((folder / 'found').glob('trials/*/result.json')))} trials"
    new = folder / "dataset" / "new"
    return "the dataset" if new.is_dir() else "part of it" if new.with_name(".new.partial").is_dir() else "nothing"


def kill_once(source: Path, work: Path, job: Job, draw: random.Random) -> dict:
    """Begin, kill, resume, compare; one row of the table."""
    share = draw.random()
    twice, second_share = draw.random() < 1 / 3, draw.random()
    folder = work / "broken"
    while True:
        fresh(source, folder, job)
        after = share * job.seconds
        code = wait(start(folder, job.words), after)
        if code is None:
            break
        share *= 0.7  # the machine was faster this time: it had ended before
    row = {
        "kind": job.kind,
        "job": job.name,
        "after_s": round(after, 2),
        "of_s": round(job.seconds, 2),
        "there": what_is_there(folder, job),
    }
    kills = 1
    if twice:
        code = wait(start(folder, job.resume(folder)), second_share * job.seconds)
        kills += code is None
        if code is None:
            row["there"] += f", then {what_is_there(folder, job)}"
    if not twice or code is None:
        code = wait(start(folder, job.resume(folder)), None)
    row |= {"kills": kills, "exit": code, "equal": False}
    if code == 0:
        got = job.outcome(folder)
        row["equal"] = got == job.unbroken
        row["differs"] = [key for key in job.unbroken if got.get(key) != job.unbroken[key]]
    leftovers = [
        str(p.relative_to(folder)) for p in folder.rglob(".*") if p.is_file() and not p.name.endswith(".lock") and ".scratch" not in p.parts
    ]
    row["left"] = leftovers
    if not row["equal"]:
        row["log"] = (folder / "log.txt").read_text()[-3000:]
    return row


def schedule(all_jobs: list[Job], kills: int, seed: int) -> list[Job]:
    """Which job each kill hits: the kinds in turn, the jobs of a kind in turn."""
    kinds = list(dict.fromkeys(job.kind for job in all_jobs))
    order = []
    for number in range(kills):
        kind = kinds[number % len(kinds)]
        mine = [job for job in all_jobs if job.kind == kind]
        order.append(mine[(number // len(kinds) + seed) % len(mine)])
    return order


def table(rows: list[dict], wanted: int, seed: int) -> str:
    """The results in Markdown."""
    kills = sum(row["kills"] for row in rows)
    good = sum(row["equal"] for row in rows)
    lines = [
        "# kill -9 at random moments",
        "",
        f"Made by `python benchmarks/kills.py --kills {wanted} --seed {seed}`; torch {torch.__version__}, one thread. {len(rows)} of {wanted} jobs, {kills} kills: "
        f"{good} resumed and ended with the unbroken job's numbers to the last bit, {len(rows) - good} did not.",
        "",
        "| | jobs | kills | equal |",
        "|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        lines.append(f"| {kind} | {len(mine)} | {sum(r['kills'] for r in mine)} | {sum(r['equal'] for r in mine)} |")
    lines += ["", "| # | job | killed after (s) | of (s) | what there was | kills | equal |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        verdict = "yes" if row["equal"] else f"NO (exit {row['exit']}) {', '.join(row.get('differs', []))}"
        lines.append(
            f"| {row['number']} | {row['kind']}: {row['job']} | {row['after_s']} | {row['of_s']} | {row['there']} | {row['kills']} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def load_libraries() -> None:
    """Everything the jobs import, so that forked processes have it."""
    import recbole.quick_start  # noqa: F401

    import recbole_mm.data.convert.amazon
    import recbole_mm.encoder.clip
    import recbole_mm.encoder.finetune
    import recbole_mm.quick_start
    import recbole_mm.tuning.search  # noqa: F401

    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default="", help="only these, separated by commas")
    parser.add_argument("--work", type=Path, help="a folder to work in (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    load_libraries()
    work = args.work or Path(tempfile.mkdtemp(prefix="kills-"))
    source = work / "source"
    shutil.rmtree(source, ignore_errors=True)
    prepare(source)
    kinds = set(args.kinds.split(",")) - {""}
    all_jobs = [job for job in jobs() if not kinds or job.kind in kinds]
    memory = args.out / "kills.json"
    rows = json.loads(memory.read_text())["rows"] if memory.is_file() else []
    rows = [row for row in rows if row["seed"] == args.seed and row["equal"]]
    done = {row["number"] for row in rows}
    for number, job in enumerate(schedule(all_jobs, args.kills, args.seed), start=1):
        if number in done:
            continue
        if not job.unbroken:
            unbroken(source, work, job)
        row = {"number": number, "seed": args.seed, **kill_once(source, work, job, random.Random(f"{args.seed}/{number}"))}
        print(json.dumps({key: value for key, value in row.items() if key != "log"}), flush=True)
        if "log" in row:
            print(row["log"], flush=True)
        rows = sorted([*rows, row], key=lambda r: r["number"])
        write_json(memory, {"rows": rows})
        write_text(args.out / "kills.md", table(rows, args.kills, args.seed))
    if args.work is None:
        shutil.rmtree(work)
    print(table(rows, args.kills, args.seed).split("\n| #")[0])
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
