"""Starting the processes of one machine for ``--nproc=N``; imports no PyTorch, so that the processes begin at once.

The processes get the environment that torchrun gives (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and a folder
where they leave their error message and, in training, the name of the run directory. When one of them ends with an error or is killed, the others are stopped
and one message says which it was, why, and how to go on.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from recbole_mm.errors import UserError

#: environment variable that names the folder for messages to the launcher
REPORTS = "RECBOLE_MM_REPORTS"
#: commands that several processes can work on together
COMMANDS = ("train", "extract", "finetune")
#: exit code of a process that only stopped because another was gone
LOST = 75
_PROGRAM = (sys.executable, "-m", "recbole_mm.cli")
_GRACE_S = 20.0  # how long the others may take to end by themselves: they write result.json and say what they know


def take_nproc(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """(N of ``--nproc=N`` or ``--nproc N``, the other words); 1 where it does not occur.

    Raises:
        UserError: when N is no whole number of at least 1, or occurs twice.
    """
    rest, found = [], []
    words = iter(arguments)
    for word in words:
        if word == "--nproc":
            found.append(next(words, ""))
        elif word.startswith("--nproc="):
            found.append(word.partition("=")[2])
        else:
            rest.append(word)
    if len(found) > 1 or (found and (not found[0].isdecimal() or int(found[0]) < 1)):
        raise UserError(
            f"--nproc: expected one whole number of at least 1, the processes of this machine, got {' and '.join(found) or 'nothing'}."
        )
    return int(found[0]) if found else 1, rest


def under_launcher() -> bool:
    """Whether this is one of several processes, started by us or by torchrun."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def free_port() -> int:
    """A port of this machine that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(command: str, arguments: Sequence[str], nproc: int) -> int:
    """Run a command in `nproc` processes; return the exit code of the first that failed, or 0."""
    with tempfile.TemporaryDirectory(prefix="recbole-mm-") as reports:
        port = free_port()
        processes = [_start(command, arguments, rank, nproc, port, reports) for rank in range(nproc)]
        before = signal.signal(signal.SIGTERM, lambda number, frame: _stop(processes, number))
        try:
            failed = _wait(processes)
        except KeyboardInterrupt:
            _stop(processes, signal.SIGINT)
            _end(processes, _GRACE_S)
            print(f"\nrecbole-mm: interrupted. {_how_to_go_on(Path(reports), command, nproc)}", file=sys.stderr)
            return 130
        finally:
            _end(processes, 0.0)
            signal.signal(signal.SIGTERM, before)
        if failed is None:
            return 0
        print(f"\nrecbole-mm: {_message(processes, failed, Path(reports), command, nproc)}", file=sys.stderr)
        code = processes[failed].returncode
        return code if code in (1, 2) else 1


def _start(command: str, arguments: Sequence[str], rank: int, nproc: int, port: int, reports: str) -> subprocess.Popen:
    package = Path(__file__).resolve().parent.parent
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # as in cli.entry
        **os.environ,
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), REPORTS: reports},
    }
    if not {"site-packages", "dist-packages"} & set(package.parts):  # a checkout that is not installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen([*_PROGRAM, command, *arguments], env=environment)


def _wait(processes: list[subprocess.Popen]) -> int | None:
    """Wait until all have ended well, or one has failed and the others have ended or been stopped; the one that failed by itself."""
    while not any(codes := [p.poll() for p in processes]):
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)
    first = [rank for rank, code in enumerate(codes) if code]
    _end(processes, _GRACE_S)
    codes = [p.returncode for p in processes]
    for candidates in (first, range(len(processes))):  # those that only miss another one are not to blame
        guilty = [rank for rank in candidates if codes[rank] not in (0, LOST, -signal.SIGTERM)]
        if guilty:
            return min(guilty, key=lambda rank: codes[rank])  # a killed one before one that failed for want of it
    return first[0]


def _stop(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _end(processes: list[subprocess.Popen], seconds: float) -> None:
    """Give the processes `seconds` to end, then make them."""
    deadline = time.monotonic() + seconds
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    _stop(processes, signal.SIGTERM)
    deadline = time.monotonic() + 5
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _read(folder: Path, name: str) -> str:
    file = folder / name
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _how_to_go_on(reports: Path, command: str, nproc: int) -> str:
    folder = _read(reports, "run_dir")
    if not folder:
        return "Start the same command again." if command != "train" else "There was no run yet; start the same command again."
    word = "" if command == "train" else f"{command} "
    return f"The work up to the last checkpoint is in {folder}; continue with `recbole-mm {word}--resume={folder} --nproc={nproc}`."


def _message(processes: list[subprocess.Popen], rank: int, reports: Path, command: str, nproc: int) -> str:
    said = _read(reports, f"error-{rank}")
    code = processes[rank].returncode
    if said and code == 2:
        return said  # wrong input: that says it all
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", which is how the system ends programs when memory runs out" if name == "SIGKILL" else ""
        what = f"was ended by {name}{hint}"
    else:
        what = f"failed with exit code {code}" + (f": {said}" if said else "; its traceback is above")
    return f"Worker {rank} of {nproc} (counted from 0) {what}. The other workers were stopped. {_how_to_go_on(reports, command, nproc)}"


def watch_launcher() -> None:
    """End this process when its launcher is gone, killed with no chance to stop us: nobody would hear of what we do."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(LOST)

    threading.Thread(target=watch, daemon=True).start()
