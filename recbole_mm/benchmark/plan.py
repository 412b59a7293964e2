"""What a benchmark consists of: models x datasets x encoders x paradigms x modalities x variants x seeds, as cells with fixed settings."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole.evaluator import metric_types

from recbole_mm.config import Config, is_known, listed_keys
from recbole_mm.errors import UserError, nearest
from recbole_mm.model import find_model, get_model
from recbole_mm.parsing import load_yaml
from recbole_mm.paths import properties_dir

#: one split and one mask for all models: the last interaction of each user is the test, the one before validation, the history no candidate
PROTOCOL = {
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": {"valid": "full", "test": "full"}},
    "eval_mask": "all",
    "mask_history": True,
}
#: keys that a block may have; it inherits those it leaves out
BLOCK_KEYS = {
    "models", "datasets", "encoders", "paradigms", "modalities", "variants", "seeds", "settings", "model_settings", "dataset_settings",
    "metric", "baseline", "within",
}  # fmt: skip
KEYS = BLOCK_KEYS | {"name", "description", "protocol", "search", "sources", "blocks"}
PARADIGMS = ("frozen", "finetuned", "end2end")


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
    variant: str | None = None

    @property
    def kind(self) -> str:
        """What distinguishes the rows of one model."""
        parts = []
        if self.encoder is not None:
            parts.append(self.encoder + ("" if self.paradigm == "frozen" else f" {self.paradigm}"))
        if self.modalities is not None:
            parts.append("+".join(self.modalities))
        if self.variant is not None:
            parts.append(self.variant)
        return ", ".join(parts)

    @property
    def group(self) -> str:
        """Name of the row this cell belongs to: all but the seed."""
        return f"{self.model}, {self.kind}" if self.kind else self.model

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
class Table:
    """One table of the result: some of the plan's cells, on one dataset, and how they are compared."""

    title: str
    dataset: str
    cells: tuple[Cell, ...]
    metric: str
    baseline: str | None = None
    within: str | None = None  # "model": a model's rows are compared with each other only


@dataclass(frozen=True)
class Plan:
    """A benchmark as read from its file."""

    name: str
    cells: tuple[Cell, ...]
    tables: tuple[Table, ...]
    metric: str
    protocol: dict[str, Any]
    sources: dict[str, str]


def read_plan(source: str | Path | dict[str, Any], overrides: Mapping[str, Any] | None = None) -> Plan:
    """Read a benchmark file, or take its content as a dict.

    Args:
        source: see docs/benchmark.md for its keys.
        overrides: settings of every cell that win over those of the file.

    Raises:
        UserError: for unknown keys, models, encoders or settings, or empty lists.
    """
    body = dict(source) if isinstance(source, dict) else load_yaml(source)
    where = "the benchmark" if isinstance(source, dict) else str(source)
    _known(body, KEYS, where)
    _mappings(body, where)
    protocol = {**PROTOCOL, **(body.get("protocol") or {})}
    blocks = body.get("blocks") or {"": {}}
    if not isinstance(blocks, dict) or not all(isinstance(block, (dict, type(None))) for block in blocks.values()):
        raise UserError(f"{where}: blocks: expected a mapping of titles to keys such as models and encoders, got {blocks!r}.")
    _check_search(body.get("search"), where)
    cells: dict[str, Cell] = {}
    tables: list[Table] = []
    for title, block in blocks.items():
        inside = f"{where}, block {title!r}" if title else where
        block = dict(block or {})
        _known(block, BLOCK_KEYS if title else KEYS, inside)
        _mappings(block, inside)
        merged = {**{key: value for key, value in body.items() if key in BLOCK_KEYS}, **block}
        merged["settings"] = {**(body.get("settings") or {}), **(block.get("settings") or {})}
        made = _cells(merged, protocol, body.get("search"), dict(overrides or {}), inside)
        for cell in made:
            same = cells.setdefault(cell.slug, cell)
            if same.settings != cell.settings:
                key = next(key for key in {**same.settings, **cell.settings} if same.settings.get(key) != cell.settings.get(key))
                raise UserError(
                    f"{inside}: the row {cell.group!r} on {cell.dataset} stands in another block with {key}={same.settings.get(key)!r}, here with "
                    f"{cell.settings.get(key)!r}. Rows of one name are run once; tell them apart with variants."
                )
        tables += _tables(str(title), [cells[cell.slug] for cell in made], merged, inside)
    name = str(body.get("name") or (Path(str(source)).stem if not isinstance(source, dict) else "benchmark"))
    sources = {str(key): " ".join(str(value).split()) for key, value in (body.get("sources") or {}).items()}
    return Plan(name, tuple(cells.values()), tuple(tables), str(body.get("metric") or "NDCG@10"), protocol, sources)


def _cells(body: dict, protocol: dict, search: dict | None, overrides: dict, where: str) -> list[Cell]:
    models = [find_model(str(name))[0] for name in _list(body, "models", where)]
    datasets, seeds = [str(name) for name in _list(body, "datasets", where)], _list(body, "seeds", where, [1, 2, 3])
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise UserError(f"{where}: seeds: expected whole numbers, got {seeds}.")
    encoders = _list(body, "encoders", where, [None])
    paradigms = _list(body, "paradigms", where, ["frozen"])
    for paradigm in paradigms:
        if paradigm not in PARADIGMS:
            raise UserError(f"{where}: paradigms: expected some of {', '.join(PARADIGMS)}, got {paradigm!r}.{nearest(paradigm, PARADIGMS)}")
    known = [path.stem for path in (properties_dir() / "encoder").glob("*.yaml")]
    for encoder in encoders:
        for part in str(encoder).split("+") if encoder is not None else ():
            if part not in known:
                raise UserError(f"{where}: encoders: unknown encoder {part!r}.{nearest(part, known)} There are {', '.join(sorted(known))}.")
    modalities = [None if m is None else tuple([m] if isinstance(m, str) else m) for m in _list(body, "modalities", where, [None])]
    _check_metric(str(body.get("metric") or "NDCG@10"), where)
    variants = body.get("variants") or {None: {}}
    for name, settings in variants.items():
        if not isinstance(settings, dict):
            raise UserError(f"{where}: variants: expected a mapping of names to settings, got {name}: {settings!r}.")
        if varied := [key for key in settings if key in overrides]:
            raise UserError(f"{where}: --{varied[0]} would make the variants equal, which differ in it. Change the file instead.")
    listed = {"model_settings": models, "dataset_settings": datasets}
    for key, names in listed.items():
        for name in body.get(key) or {}:
            if name not in names and not _elsewhere(key, name):
                raise UserError(f"{where}: {key}: {name!r} is none of {', '.join(names)}.{nearest(name, names)}")
    cells = []
    for model, dataset in itertools.product(models, datasets):
        uses = getattr(get_model(model), "uses_features", False)
        choices = itertools.product(encoders, paradigms, modalities) if uses else [(None, "frozen", None)]
        for (encoder, paradigm, chosen), (variant, own), seed in itertools.product(choices, variants.items(), seeds):
            by_dataset = (own.get("dataset_settings") or {}).get(dataset) or {}
            own = {**{key: value for key, value in own.items() if key != "dataset_settings"}, **by_dataset}
            settings = {
                **(body.get("settings") or {}),
                **protocol,
                **((body.get("dataset_settings") or {}).get(dataset) or {}),
                **((body.get("model_settings") or {}).get(model) or {}),
                **own,
                **overrides,
                "model": model, "dataset": dataset, "seed": seed,
            }  # fmt: skip
            if uses:
                settings["encoder_training"] = paradigm
                if encoder is not None and "+" in encoder:  # one encoder per modality; see recbole_mm.benchmark.needs.combine
                    if paradigm != "frozen":
                        raise UserError(f"{where}: the encoders {encoder} can only be frozen together, not {paradigm}.")
                    settings["feature_set"] = encoder
                elif encoder is not None:
                    settings["encoder"] = encoder
                    settings.setdefault("feature_set", None)  # not the set that a converted dataset names as its own
                if chosen is not None:
                    settings["modalities"] = list(chosen)
            place = str(body.get("metric") or "NDCG@10").partition("@")[2]
            if (
                place
                and settings.get("topk")
                and int(place) not in (settings["topk"] if isinstance(settings["topk"], list) else [settings["topk"]])
            ):
                raise UserError(
                    f"{where}: metric: {body.get('metric') or 'NDCG@10'} is not computed with topk {settings['topk']}. Add {place} to topk, or set another metric."
                )
            if unknown := [key for key in settings if not is_known(key) and key not in (settings.get("extra_keys") or ())]:
                raise UserError(f"{where}: unknown setting {unknown[0]!r} of {model}.{nearest(unknown[0], listed_keys())}")
            cells.append(
                Cell(
                    model,
                    dataset,
                    encoder if uses else None,
                    paradigm,
                    chosen,
                    seed,
                    settings,
                    search,
                    None if variant is None else str(variant),
                )
            )
    return cells


def _check_search(search: dict | None, where: str) -> None:
    """The options of a search per row are those of recbole-mm search."""
    options = ("params_file", "strategy", "trials", "pruner", "seed")
    for key in search or ():
        if key not in options:
            raise UserError(f"{where}: search: unknown key {key!r}.{nearest(key, options)} It takes {', '.join(options)}.")


def _check_metric(metric: str, where: str) -> None:
    """`metric` names values of single users: <metric>@<k>, for VIP5 <task>/<metric>@<k>."""
    name, at, places = metric.rpartition("/")[2].partition("@")
    if name.lower() not in metric_types or (at and not places.isdigit()):
        raise UserError(f"{where}: metric: expected e.g. NDCG@10, got {metric!r}.{nearest(name, [m.upper() for m in metric_types])}")


def _elsewhere(key: str, name: str) -> bool:
    """Whether settings for `name`, which this block does not run, may be meant for another block."""
    if key == "dataset_settings":
        return True
    try:
        return find_model(str(name))[0] == name
    except UserError:
        return False


def _tables(title: str, cells: list[Cell], body: dict, where: str) -> list[Table]:
    """One table per dataset."""
    metric, baseline, within = str(body.get("metric") or "NDCG@10"), body.get("baseline"), body.get("within")
    if within not in (None, "model"):
        raise UserError(f"{where}: within: expected model or nothing, got {within!r}.")
    if baseline is not None:
        known = list(dict.fromkeys(cell.kind if within else cell.group for cell in cells))
        if baseline not in known:
            raise UserError(f"{where}: baseline: expected one of the rows {', '.join(known)}, got {baseline!r}.{nearest(baseline, known)}")
    return [
        Table(
            f"{title}: {dataset}" if title else dataset, dataset, tuple(c for c in cells if c.dataset == dataset), metric, baseline, within
        )
        for dataset in dict.fromkeys(cell.dataset for cell in cells)
    ]


def _known(body: dict, keys: set[str], where: str) -> None:
    for key in body:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}.{nearest(key, keys)} It takes {', '.join(sorted(keys))}.")


def _mappings(body: dict, where: str) -> None:
    for key in ("settings", "model_settings", "dataset_settings", "variants", "protocol", "search", "sources"):
        value = body.get(key)
        deep = key in ("model_settings", "dataset_settings")
        if value is not None and (not isinstance(value, dict) or (deep and not all(isinstance(v, dict) for v in value.values()))):
            raise UserError(f"{where}: {key}: expected a mapping{' of names to mappings' if deep else ''}, got {value!r}.")


def _list(body: dict, key: str, where: str, default: list | None = None) -> list:
    value = body.get(key, default)
    if isinstance(value, (str, int)):
        value = [value]
    if not isinstance(value, list) or not value or "" in value:
        raise UserError(f"{where}: {key}: expected a list with at least one entry, got {value!r}.")
    return value
