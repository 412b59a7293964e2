"""Gather what a report shows: runs, searches, failures, the dataset, and what the models recommend to sampled users."""

import base64
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mm.errors import UserError

THUMBNAIL = 112  # pixels
_MAX_PICTURES = 4000
_EXPLANATIONS = 12  # texts shown of each run and prompt
_POINTS = 101  # of the curve of values over users, however many users there are


@dataclass
class Gathered:
    """Everything a page is rendered from; plain values only."""

    title: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    searches: list[Path] = field(default_factory=list)
    users: list[dict[str, Any]] = field(default_factory=list)
    items: dict[str, dict[str, str]] = field(default_factory=dict)
    cards: list[dict[str, Any]] = field(default_factory=list)
    spreads: list[dict[str, Any]] = field(default_factory=list)
    explanations: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, str]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(paths: list[Path]) -> tuple[list[Path], list[Path], list[dict[str, str]]]:
    """Run directories, search folders and failures below the given folders.

    Raises:
        UserError: when a path does not exist or nothing is found.
    """
    runs, searches, failures = [], [], []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"report: {path} is no folder. Name run directories, or the folder of a search or a benchmark.")
        for file in sorted([path / "result.json", *path.glob("*/result.json"), *path.glob("runs/*/result.json")]):
            if not file.is_file():
                continue
            try:
                record = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                failures.append({"run": str(file.parent), "reason": "result.json is broken"})
                continue
            if record.get("kind") == "search":
                searches.append(file.parent)
            elif record.get("status") == "finished" and record.get("test"):
                runs.append(file.parent)
            elif record.get("status") in ("failed", "running"):
                failures.append({"run": str(file.parent), "reason": record.get("error") or "has not ended"})
        for file in sorted(path.glob("cells/*.json")):
            try:
                cell = json.loads(file.read_text(encoding="utf-8"))
                failed = cell["record"].get("status") == "failed"
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"report: {file} is broken. Remove it and run the benchmark again, which repeats that cell.") from None
            if failed:
                failures.append({"run": file.stem, "reason": cell["record"].get("error", "")})
    runs, searches = list(dict.fromkeys(runs)), list(dict.fromkeys(searches))
    if not runs and not searches and not failures:
        raise UserError(f"report: no finished run below {', '.join(map(str, paths))}. A run directory holds result.json.")
    return runs, searches, failures


def label(record: dict[str, Any], given: dict[str, Any]) -> str:
    """Name of a run in tables and legends."""
    parts = [record["model"]]
    if record.get("modalities"):
        parts.append(record.get("feature_set") or record.get("encoder") or "features")
        if given.get("modalities"):
            parts.append("+".join(record["modalities"]))
        if record.get("encoder_training") not in (None, "frozen"):
            parts.append(record["encoder_training"])
    return ", ".join(parts)


def gather(paths: list[str | Path], title: str, users: int = 8, topk: int = 10, seed: int = 0) -> Gathered:
    """Read the runs below `paths`; for one run of each label also what it recommends to `users` sampled users."""
    folders, searches, failures = find([Path(p) for p in paths])
    page = Gathered(title, searches=searches, failures=failures)
    chosen: dict[tuple[str, str], Path] = {}
    for folder in folders:
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        name = label(record, record.get("settings") or {})
        page.runs.append({"label": name, "folder": str(folder), **record})
        chosen.setdefault((record["dataset"], name), folder)
        for picture in sorted((folder / "figures").glob("*.png")):
            page.figures.append({"title": f"{name}: {picture.stem.replace('-', ' ')}", "source": _uri(picture.read_bytes(), "png")})
        page.explanations += _explanations(folder, f"{name}, seed {record.get('seed')}")
    for (dataset, name), folder in chosen.items():
        page.spreads += _spread(folder, dataset, name)
    for dataset in dict.fromkeys(key[0] for key in chosen):
        _card(page, dataset, next(folder for (d, _), folder in chosen.items() if d == dataset))
    for path in map(Path, paths):
        if (path / "table.md").is_file():
            page.tables.append((path / "table.md").read_text(encoding="utf-8"))
    if users > 0:
        for dataset in dict.fromkeys(key[0] for key in chosen):
            _recommendations(page, dataset, {name: folder for (d, name), folder in chosen.items() if d == dataset}, users, topk, seed)
    return page


def _recommendations(page: Gathered, dataset: str, folders: dict[str, Path], count: int, topk: int, seed: int) -> None:
    """History and lists of sampled test users, models side by side; the test item is kept as a candidate, so that hits can be marked."""
    import torch
    from recbole.utils import ModelType

    from recbole_mm.data.content import ItemContent
    from recbole_mm.quick_start import load_model

    sampled: list[str] | None = None
    shown: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        try:
            run = load_model(folder)
        except UserError as error:
            page.notes.append(f"{name}: no recommendations shown: {error}")
            continue
        if run.config["MODEL_TYPE"] not in (ModelType.GENERAL, ModelType.SEQUENTIAL, ModelType.TRADITIONAL):
            continue
        data, content = run.dataset, ItemContent.from_config(run.config, run.dataset)
        loader = run.test_data
        if not hasattr(loader, "row_users"):
            page.notes.append(f"{name}: no recommendations shown: it was not evaluated by full sort.")
            continue
        tokens = data.field2id_token[data.uid_field]
        row_of = {str(tokens[user]): row for row, user in enumerate(loader.row_users.tolist())}
        if sampled is None:
            sampled = sorted(row_of)
            sampled = [sampled[i] for i in np.random.default_rng(seed).permutation(len(sampled))[:count]]
        histories = _histories(run)
        for user in sampled:
            if user not in row_of:
                continue
            row = row_of[user]
            with torch.no_grad():
                scores = (
                    run.model.full_sort_predict(loader.rows(row, row + 1).to(run.config["device"])).view(-1, data.item_num)[0].float().cpu()
                )
            targets = set(loader.pairs("positive", row, row + 1)[1].tolist())
            known = histories.get(int(loader.row_users[row]), [])
            scores[0] = -torch.inf
            scores[[item for item in known if item not in targets]] = -torch.inf
            values, order = torch.sort(scores, descending=True, stable=True)
            best = [(int(i), float(v)) for i, v in zip(order[:topk], values[:topk]) if np.isfinite(float(v))]
            entry = shown.setdefault(user, {"user": user, "dataset": dataset, "history": [], "targets": [], "models": []})
            if not entry["history"]:
                entry["history"] = [_item(page, content, data, item) for item in [i for i in known if i not in targets][-topk:]]
                entry["targets"] = [_item(page, content, data, item) for item in sorted(targets)]
            list_ = [{"item": _item(page, content, data, item), "score": score, "hit": item in targets} for item, score in best]
            entry["models"].append({"label": name, "list": list_})
    page.users += [shown[user] for user in sampled or [] if user in shown]


def _histories(run) -> dict[int, list[int]]:
    """User id -> items of training and validation, oldest first where times are known."""
    rows: list[tuple[int, float, int]] = []
    for loader in (run.train_data, run.valid_data):
        part = loader._dataset
        feat = part.inter_feat
        time = feat[part.time_field].tolist() if part.time_field in feat.interaction else [0.0] * len(feat)
        rows += zip(feat[part.uid_field].tolist(), time, feat[part.iid_field].tolist())
        sequence = f"{part.iid_field}{run.config['LIST_SUFFIX']}"
        if sequence in feat.interaction:  # the first items of a sequence are nobody's target
            for user, items in zip(feat[part.uid_field].tolist(), feat[sequence].tolist()):
                rows += [(user, -1e18 + place, item) for place, item in enumerate(items) if item > 0]
    histories: dict[int, list[int]] = {}
    for user, _, item in sorted(rows, key=lambda r: (r[0], r[1])):
        items = histories.setdefault(user, [])
        if item not in items:
            items.append(item)
    return histories


def _item(page: Gathered, content, data, item: int) -> str:
    """Register an item with title and thumbnail; return its key on the page."""
    token = str(data.field2id_token[data.iid_field][item])
    key = hashlib.sha256(f"{content.folder}\n{token}".encode()).hexdigest()[:10]
    if key not in page.items:
        picture = ""
        if len(page.items) < _MAX_PICTURES and content.image_path(item) is not None:
            try:
                picture = thumbnail(content.image(item))
            except UserError:
                picture = ""
        page.items[key] = {"token": token, "title": content.title(item) or token, "picture": picture}
    return key


def thumbnail(picture) -> str:
    """A small JPEG as a data URI."""
    picture = picture.copy()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=72)
    return _uri(stream.getvalue(), "jpeg")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _card(page: Gathered, dataset: str, folder: Path) -> None:
    """The card of a dataset, from its files where they still are."""
    from recbole_mm.data.card import describe
    from recbole_mm.quick_start import read_settings

    try:
        page.cards.append({**describe(Path(read_settings(folder)["data_path"]) / dataset), "name": dataset})
    except (UserError, OSError, KeyError) as error:
        page.notes.append(f"{dataset}: no card of the data: {error}")


def _spread(folder: Path, dataset: str, label: str) -> list[dict[str, Any]]:
    """How each metric is spread over the users of one run: the values at evenly spaced shares of users."""
    path = folder / "per_user.npz"
    if not path.is_file():
        return []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in arrays.files if name not in ("users", "targets_hash")}
    except (OSError, ValueError, zipfile.BadZipFile):
        return []
    known = {name: column[~np.isnan(column)] for name, column in values.items() if column.dtype.kind == "f" and column.ndim == 1}
    shares = np.linspace(0, 1, _POINTS)
    curves = {name: np.quantile(column, shares).round(6).tolist() for name, column in known.items() if len(column)}
    return [{"dataset": dataset, "label": label, "curves": curves, "users": max((len(c) for c in known.values()), default=0)}]


def _explanations(folder: Path, label: str) -> list[dict[str, Any]]:
    """Texts that VIP5 wrote for a prompt beside those of the users, evenly spaced over the file."""
    found = []
    for path in sorted(folder.glob("explanations-*.tsv")):
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[1:]]
        rows = [row for row in rows if len(row) == 3]
        places = np.unique(np.linspace(0, len(rows) - 1, min(_EXPLANATIONS, len(rows))).astype(int)) if rows else []
        found.append(
            {"label": label, "prompt": path.stem.removeprefix("explanations-"), "rows": [rows[i] for i in places], "all": len(rows)}
        )
    return found
