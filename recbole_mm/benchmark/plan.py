"""What a benchmark consists of: models x datasets x encoders x paradigms x modalities x seeds, as cells with fixed settings."""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_mm.config import Config
from recbole_mm.errors import UserError, nearest
from recbole_mm.model import find_model, get_model
from recbole_mm.parsing import load_yaml

#: one split and one mask for all models: the last interaction of each user is the test, the one before validation, the history no candidate
PROTOCOL = {
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": {"valid": "full", "test": "full"}},
    "eval_mask": "all",
    "mask_history": True,
}
KEYS = {
    "name", "models", "datasets", "encoders", "paradigms", "modalities", "seeds", "settings", "model_settings", "dataset_settings",
    "protocol", "metric", "baseline", "search", "description",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run: what distinguishes it, and everything that is set for it."""

    model: str
    dataset: str
    encoder: str | None
    paradigm: str
    modalities: tuple[str, ...] | None
    seed: int
    settings: dict[str, Any] = field(compare=False)
    search: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def group(self) -> str:
        """Name of the row this cell belongs to: all but the seed."""
        parts = [self.model]
        if self.encoder is not None:
            parts.append(self.encoder + ("" if self.paradigm == "frozen" else f" {self.paradigm}"))
        if self.modalities is not None:
            parts.append("+".join(self.modalities))
        return ", ".join(parts)

    @property
    def slug(self) -> str:
        """File name of the cell."""
        text = f"{self.dataset}-{self.group}-seed{self.seed}"
        return re.sub(r"[^A-Za-z0-9+_.-]+", "_", text)

    def key(self) -> str:
        """Hash of all that its result depends on; a cell whose key has changed is run again."""
        full = Config(config_dict=self.settings).settings()
        for name in ("checkpoint_dir", "run_name", "show_progress", "state", "tensorboard"):
            full.pop(name, None)
        return hashlib.sha256(json.dumps([full, self.search], sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Plan:
    """A benchmark as read from its file."""

    name: str
    cells: tuple[Cell, ...]
    metric: str
    baseline: str | None
    protocol: dict[str, Any]


def read_plan(source: str | Path | dict[str, Any]) -> Plan:
    """Read a benchmark file, or take its content as a dict.

    Raises:
        UserError: for unknown keys, models, encoders, or empty lists.
    """
    body = dict(source) if isinstance(source, dict) else load_yaml(source)
    where = "the benchmark" if isinstance(source, dict) else str(source)
    for key in body:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}.{nearest(key, KEYS)} It takes {', '.join(sorted(KEYS))}.")
    models = [find_model(name)[0] for name in _list(body, "models", where)]
    datasets, seeds = _list(body, "datasets", where), _list(body, "seeds", where, [1, 2, 3])
    if not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"{where}: seeds: expected whole numbers, got {seeds}.")
    encoders = _list(body, "encoders", where, [None])
    paradigms = _list(body, "paradigms", where, ["frozen"])
    modalities = [None if m is None else tuple([m] if isinstance(m, str) else m) for m in _list(body, "modalities", where, [None])]
    protocol = {**PROTOCOL, **(body.get("protocol") or {})}
    metric = str(body.get("metric") or "NDCG@10")
    cells = []
    for model, dataset in itertools.product(models, datasets):
        uses = getattr(get_model(model), "uses_features", False)
        variants = itertools.product(encoders, paradigms, modalities) if uses else [(None, "frozen", None)]
        for (encoder, paradigm, chosen), seed in itertools.product(variants, seeds):
            settings = {
                **(body.get("settings") or {}),
                **protocol,
                **((body.get("dataset_settings") or {}).get(dataset) or {}),
                **((body.get("model_settings") or {}).get(model) or {}),
                "model": model, "dataset": dataset, "seed": seed,
            }  # fmt: skip
            if uses:
                settings["encoder_training"] = paradigm
                if encoder is not None:
                    settings["encoder"] = encoder
                if chosen is not None:
                    settings["modalities"] = list(chosen)
            cells.append(Cell(model, dataset, encoder if uses else None, paradigm, chosen, seed, settings, body.get("search")))
    baseline = body.get("baseline")
    if baseline is not None and baseline not in {cell.group for cell in cells}:
        groups = list(dict.fromkeys(cell.group for cell in cells))
        raise UserError(f"{where}: baseline: expected one of the rows {', '.join(groups)}, got {baseline!r}.{nearest(baseline, groups)}")
    return Plan(str(body.get("name") or Path(str(source)).stem), tuple(cells), metric, baseline, protocol)


def _list(body: dict, key: str, where: str, default: list | None = None) -> list:
    value = body.get(key, default)
    if isinstance(value, (str, int)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key}: expected a list with at least one entry, got {value!r}.")
    return value
