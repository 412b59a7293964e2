"""Logging of a run: RecBole logs to the root logger; we give it a file in the run directory and a console, and take both back afterwards."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_COLOUR = re.compile(r"\x1B(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR, "critical": logging.CRITICAL}


class _Plain(logging.Formatter):
    """Without RecBole's colour codes, for files and for consoles that are no terminals."""

    def format(self, record):
        return _COLOUR.sub("", super().format(record))


class _File(logging.FileHandler):
    """A log on a full disk ends; logging's own way is a traceback for each line that follows."""

    def handleError(self, record):
        if isinstance(sys.exc_info()[1], OSError):
            self.setLevel(logging.CRITICAL + 1)
        else:
            super().handleError(record)

    def close(self):
        try:
            super().close()
        except OSError:  # what was still in the buffer
            pass


@contextmanager
def run_log(path: Path | None, state: str | None, console: bool = True) -> Iterator[None]:
    """Send the root logger to the file `path` and to stderr while the block runs; `state` is RecBole's name of the level."""
    level = LEVELS.get(str(state or "info").lower(), logging.INFO)
    handlers: list[logging.Handler] = []
    if path is not None:
        file = _File(path, encoding="utf-8")
        file.setFormatter(_Plain("%(asctime)s %(levelname)s  %(message)s"))
        handlers.append(file)
    if console:
        stream = logging.StreamHandler(sys.stderr)
        stream.setFormatter((logging.Formatter if sys.stderr.isatty() else _Plain)("%(asctime)s %(levelname)s  %(message)s", "%H:%M:%S"))
        handlers.append(stream)
    handlers = handlers or [logging.NullHandler()]  # without any, Python prints warnings all the same
    root = logging.getLogger()
    before, root_level = list(root.handlers), root.level
    for handler in handlers:
        handler.setLevel(level)
        root.addHandler(handler)
    root.setLevel(level)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.handlers[:] = before
        root.setLevel(root_level)
