"""Search spaces: RecBole's text format and typed YAML, as Optuna distributions.

RecBole's format, one parameter a line: ``name choice [a, b]``, ``name uniform low,high``, ``name quniform low,high,step``, ``name
loguniform low,high`` (bounds are natural logarithms, as in hyperopt). YAML: ``name: {type: float|int|categorical, low, high, scale: log,
step, choices}``.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_mm.errors import UserError, nearest
from recbole_mm.parsing import load_yaml, parse_value

KINDS = ("choice", "uniform", "quniform", "loguniform")


@dataclass(frozen=True)
class Parameter:
    """One dimension: `choices`, or numbers from `low` to `high`, in steps, on a log scale, whole or not."""

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    whole: bool = False

    def suggest(self, trial) -> Any:
        """Draw a value from an Optuna trial. Lists and other values that Optuna's storages do not keep are chosen by their JSON text."""
        if self.choices is not None:
            texts = [value if _storable(value) else json.dumps(value) for value in self.choices]
            return self.choices[texts.index(trial.suggest_categorical(self.name, texts))]
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def stored(self, value: Any) -> Any:
        """`value` as the trial's parameter holds it."""
        return value if self.choices is None or _storable(value) else json.dumps(value)

    def grid(self) -> list[Any]:
        """Every value, for exhaustive search.

        Raises:
            UserError: for a continuous parameter.
        """
        if self.choices is not None:
            return list(self.choices)
        step = self.step or (1 if self.whole else None)
        if step is None or self.log:
            raise UserError(f"{self.name} is continuous; a grid needs `choice` or a step. Use --strategy=random or tpe.")
        count = int(math.floor((self.high - self.low) / step + 1e-9)) + 1
        values = [self.low + k * step for k in range(count)]
        return [int(v) for v in values] if self.whole else values


def _storable(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def read_space(path: str | Path) -> list[Parameter]:
    """Read a search space; ``.yaml`` and ``.yml`` are typed YAML, everything else RecBole's text format.

    Raises:
        UserError: naming file and line of what cannot be understood.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        space = [_from_yaml(name, body, path) for name, body in load_yaml(path).items()]
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise UserError(f"The parameter file {path} does not exist. Ready ones are in properties/tuning/.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The parameter file {path} cannot be read: {error}.") from None
        space = [
            _from_line(line.strip(), number, path)
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
    if not space:
        raise UserError(f"{path}: expected at least one parameter, e.g. `learning_rate choice [1e-4, 1e-3]`.")
    names = [p.name for p in space]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{path}: the parameter {twice[0]!r} stands twice.")
    return space


def _from_line(line: str, number: int, path: Path) -> Parameter:
    where = f"{path}, line {number}"
    parts = line.split(None, 2)
    if len(parts) < 3:
        raise UserError(f"{where}: expected `name kind values`, e.g. `learning_rate choice [1e-4, 1e-3]`, got {line!r}.")
    name, kind, text = parts
    if kind not in KINDS:
        raise UserError(f"{where}: unknown kind {kind!r}.{nearest(kind, KINDS)} There are {', '.join(KINDS)}.")
    if kind == "choice":
        values = parse_value(text)
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: choice expects a list such as [64, 128], got {text!r}.")
        return Parameter(name, choices=tuple(parse_value(v) if isinstance(v, str) else v for v in values))
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != (3 if kind == "quniform" else 2) or not numbers[0] < numbers[1] or not all(map(math.isfinite, numbers)):
        raise UserError(f"{where}: {kind} expects low,high{',step' if kind == 'quniform' else ''} with low < high, got {text!r}.")
    if kind == "quniform":
        low, high, step = numbers
        if step <= 0:
            raise UserError(f"{where}: the step must be above 0, got {step}.")
        whole = all(v.is_integer() for v in numbers)
        return Parameter(name, low=low, high=low + math.floor((high - low) / step + 1e-9) * step, step=step, whole=whole)
    if kind == "loguniform":
        return Parameter(name, low=math.exp(numbers[0]), high=math.exp(numbers[1]), log=True)
    return Parameter(name, low=numbers[0], high=numbers[1])


def _from_yaml(name: str, body: Any, path: Path) -> Parameter:
    if isinstance(body, list):
        body = {"type": "categorical", "choices": body}
    known = {"type", "low", "high", "scale", "step", "choices"}
    if not isinstance(body, dict) or body.get("type") not in ("float", "int", "categorical"):
        raise UserError(f"{path}: {name}: expected {{type: float|int|categorical, ...}} or a list, got {body!r}.")
    unknown = [key for key in body if key not in known]
    if unknown:
        raise UserError(f"{path}: {name}: unknown key {unknown[0]!r}.{nearest(unknown[0], known)}")
    if body["type"] == "categorical":
        if not isinstance(body.get("choices"), list) or not body["choices"]:
            raise UserError(f"{path}: {name}: categorical expects a list under choices, got {body.get('choices')!r}.")
        return Parameter(name, choices=tuple(body["choices"]))
    low, high, step = body.get("low"), body.get("high"), body.get("step")
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (low, high)) or not low < high:
        raise UserError(f"{path}: {name}: expected numbers low < high, got {low!r} and {high!r}.")
    log = body.get("scale") == "log"
    if body.get("scale") not in (None, "log", "linear") or (log and low <= 0) or (step is not None and (log or step <= 0)):
        raise UserError(f"{path}: {name}: scale is linear or log; log needs low above 0 and no step.")
    return Parameter(name, low=low, high=high, step=step, log=log, whole=body["type"] == "int")


def grid_points(space: list[Parameter]) -> Iterator[dict[str, Any]]:
    """Every combination of the space, in the order of the file."""
    for values in itertools.product(*(p.grid() for p in space)):
        yield dict(zip((p.name for p in space), values))
