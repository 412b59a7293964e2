"""What a cell lacks before it can run, found without training anything: dataset folder, files, columns, pictures, texts, features, weights.

Each need names the thing and the remedy: where to get it and which command makes it. A benchmark file says under ``sources`` where its
datasets and checkpoints come from.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mm.benchmark.plan import Cell, Plan
from recbole_mm.config import Config
from recbole_mm.data.content import ItemContent
from recbole_mm.data.features import META_FILE, align, feature_files, read_ids, write_feature_set
from recbole_mm.encoder.weights import find_weights, hub_or_path, missing_weights, online, weights_folder
from recbole_mm.errors import UserError
from recbole_mm.files import derived_folder, locked
from recbole_mm.model import get_model
from recbole_mm.parsing import load_yaml
from recbole_mm.paths import bundled_dataset_dir, properties_dir


@dataclass(frozen=True)
class Need:
    """Something that is not there: what, and what to do about it. `fetched`: the run itself downloads it."""

    what: str
    remedy: str
    fetched: bool = False


def needs_of(plan: Plan, cells: list[Cell] | None = None) -> dict[Cell, list[Need]]:
    """What each cell lacks; empty lists for those that can run. Seeds of one row lack the same, which is looked up once."""
    _probe.cache_clear()  # the files may have changed since
    _encoder.cache_clear()
    known: dict[tuple, list[Need]] = {}
    result = {}
    for cell in plan.cells if cells is None else cells:
        row = (cell.dataset, cell.group)
        if row not in known:
            known[row] = list(dict.fromkeys(_needs(cell, plan.sources)))
        result[cell] = known[row]
    return result


def describe(needs: Mapping[Cell, list[Need]]) -> str:
    """All needs of all cells, each once, with the number of cells that wait for it; empty when there are none."""
    waiting: dict[Need, int] = {}
    for lacking in needs.values():
        for need in lacking:
            waiting[need] = waiting.get(need, 0) + 1
    lines = []
    for fetched in (False, True):
        chosen = [(need, count) for need, count in waiting.items() if need.fetched == fetched]
        if chosen:
            lines.append("Downloaded when first needed:" if fetched else "Missing:")
        for need, count in chosen:
            lines.append(f"  * {need.what} ({count} cells)")
            if not fetched:
                lines.append(f"    {need.remedy}")
    return "\n".join(lines)


def blocked(lacking: list[Need]) -> bool:
    return any(not need.fetched for need in lacking)


def _needs(cell: Cell, sources: Mapping[str, str]) -> Iterator[Need]:
    name = cell.dataset
    given = cell.settings.get("data_path")
    roots = [Path(str(given))] if given is not None else [Path("dataset"), bundled_dataset_dir()]
    root = next((root for root in roots if (root / name).is_dir()), None)
    source = sources.get(name) or "docs/convert.md says how to make one; --data_path names the folder that holds it."
    downloaded = name not in sources and (name in Config._downloadable() or name == "ml-100k")  # by RecBole itself
    if root is None and not downloaded:
        yield Need(f"the dataset {name}: no folder {roots[0] / name}", source)
        settings = _settings(cell, None)
    else:
        folder = (root or roots[0]) / name
        try:
            settings = Config(config_dict=cell.settings).final_config_dict
        except UserError:
            return  # a wrong setting is not a missing thing; whoever runs the cell says it
        if root is not None:
            yield from _interactions(folder, name, settings, source)
        yield from _features(cell, folder, settings, source)
    yield from _weights(cell, settings, sources, None if root is None else root / name)


def _settings(cell: Cell, own: Path | None) -> dict[str, Any]:
    """The cell's settings without a dataset: property files and what the benchmark sets."""
    folder, settings = properties_dir(), {}
    for path in (folder / "overall.yaml", folder / "model" / f"{cell.model}.yaml", folder / "dataset" / f"{cell.dataset}.yaml"):
        if path.is_file():
            settings.update(load_yaml(path))
    settings.update((settings.pop("per_dataset", None) or {}).get(cell.dataset) or {})
    encoder = cell.settings.get("encoder", settings.get("encoder"))
    path = folder / "encoder" / f"{encoder}.yaml"
    if path.is_file():
        settings.update(load_yaml(path))
    return {**settings, **cell.settings}


def _interactions(folder: Path, name: str, settings: Mapping, source: str) -> Iterator[Need]:
    """The interaction files and their columns."""
    if settings.get("inter_from"):
        return
    parts = settings.get("benchmark_filename")
    files = [f"{name}.{part}.inter" for part in parts] if parts else [f"{name}.inter"]
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        yield Need(f"the interactions {folder / absent[0]}" + (f" and {', '.join(absent[1:])}" if absent[1:] else ""), source)
        return
    wanted = (settings.get("load_col") or {}).get("inter") or []
    for file in files:
        with open(folder / file, encoding="utf-8", errors="replace") as stream:
            there = {column.split(":")[0] for column in stream.readline().rstrip("\n").split(settings.get("field_separator") or "\t")}
        lacking = [column for column in wanted if column not in there]
        if lacking:
            yield Need(f"the column {lacking[0]} in {folder / file}", source)


def _modalities(cell: Cell, settings: Mapping) -> list[str]:
    """Which kinds of item features the cell wants, as far as encoders make them."""
    if "visual_tokens" in settings and "visual_modality" in settings:
        return [str(settings["visual_modality"])] if settings["visual_tokens"] != 0 else []
    if "peft_scope" in settings:
        return ["visual", "textual"]
    return list(settings.get("modalities") or ())


def _features(cell: Cell, folder: Path, settings: Mapping, source: str) -> Iterator[Need]:
    """The feature set, or what it is made from."""
    uses = getattr(get_model(cell.model), "uses_features", False)
    wanted = _modalities(cell, settings)
    if "peft_scope" in settings:
        yield from _content(folder, cell.dataset, settings, wanted, source)
        return
    if not uses or settings.get("visual_tokens") == 0:
        return
    encoder, feature_set, training = settings.get("encoder"), settings.get("feature_set"), settings.get("encoder_training")
    if training == "end2end":
        yield from _content(folder, cell.dataset, settings, wanted or _given_by(encoder), source)
        return
    name = feature_set or (None if encoder is None else f"{encoder}-finetuned" if training == "finetuned" else encoder)
    sets = [folder] if name is None else [folder / "features" / name, derived_folder(folder) / "features" / name]
    there = next((files for path in sets if (files := feature_files(path))), {})
    if there:
        lacking = [modality for modality in wanted if modality not in there and modality not in feature_files(folder)]
        if lacking and encoder is None:
            yield Need(f"{lacking[0]} features in {sets[0]}", f"It has {', '.join(there)}. {source}")
        return
    where = f" --data_path={folder.parent}" if str(folder.parent) not in ("dataset", str(bundled_dataset_dir())) else ""
    if feature_set and "+" in feature_set:
        yield from _content(folder, cell.dataset, settings, wanted or ["visual", "textual"], source)
    elif training == "finetuned":
        yield Need(
            f"the feature set {sets[0]}",
            f"Fine-tune the encoder on the catalogue: recbole-mm finetune --dataset={cell.dataset} --encoder={encoder}{where}",
        )
        yield from _content(folder, cell.dataset, settings, wanted or _given_by(encoder), source)
    elif encoder is not None:
        yield from _content(folder, cell.dataset, settings, wanted or _given_by(encoder), source)
    elif feature_set:
        yield Need(f"the feature set {sets[0]}", source)
    elif not ItemContentProbe(folder, cell.dataset, settings).anything:
        yield Need(f"item features in {folder} (<modality>.npy), or pictures or texts to make them from", source)


def _given_by(encoder: str | None) -> list[str]:
    kind = encoder and (load_yaml(properties_dir() / "encoder" / f"{encoder}.yaml").get("encoder_class") or encoder)
    return {"cnn": ["visual"], "sentence": ["textual"]}.get(kind, ["visual", "textual"])


class ItemContentProbe:
    """Which pictures and texts a dataset's folder has, before it is loaded."""

    def __init__(self, folder: Path, name: str, settings: Mapping):
        fields, images = settings.get("text_fields") or (), settings.get("image_folder") or "images"
        separator, key = settings.get("field_separator") or "\t", settings.get("ITEM_ID_FIELD") or "item_id"
        content = ItemContent(folder, ["[PAD]"], fields, images, name, separator, key)
        self.images_folder, self.fields = folder / images, list(fields)
        self.images = bool(content.pictures)
        table = content.read_table()
        self.item_file = table is not None
        self.texts = table is not None and any(field in table and table[field].str.strip().any() for field in fields)
        self.anything = self.images or self.texts


def _content(folder: Path, name: str, settings: Mapping, wanted: list[str], source: str) -> Iterator[Need]:
    """Pictures and texts."""
    probe = _probe(folder, name, _frozen(settings))
    if "visual" in wanted and not probe.images:
        listed = (folder / "images.csv").is_file()
        yield Need(
            f"item pictures in {probe.images_folder}",
            f"Their addresses are in {folder / 'images.csv'}: recbole-mm convert pictures --src {folder}" if listed else source,
        )
    if "textual" in wanted and not probe.texts:
        if not probe.item_file:
            yield Need(f"item texts in {folder / (name + '.item')}", source)
        else:
            fields = ", ".join(probe.fields) or "none: set text_fields"
            yield Need(f"item texts in {folder / (name + '.item')} (text_fields: {fields})", source)


def _frozen(settings: Mapping) -> tuple:
    keys = ("text_fields", "image_folder", "field_separator", "ITEM_ID_FIELD")
    return tuple((key, tuple(settings[key]) if isinstance(settings.get(key), list) else settings.get(key)) for key in keys)


@functools.lru_cache(64)
def _probe(folder: Path, name: str, settings: tuple) -> ItemContentProbe:
    return ItemContentProbe(folder, name, dict(settings))


# weights


@contextmanager
def _offline():
    """Look only at this machine: a check must not download."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _weights(cell: Cell, settings: Mapping, sources: Mapping[str, str], folder: Path | None) -> Iterator[Need]:
    """Checkpoints of encoders and language models that the cell would read."""
    model = settings.get("language_model")
    if model and "visual_tokens" in settings and not Path(str(model)).exists():
        yield Need(
            f"the language model {model}",
            sources.get(str(model)) or "Give its file or folder with --language_model (docs/vip5.md).",
        )
    if "peft_scope" in settings:
        pretrained = settings.get("pretrained")
        yield from _clip_model(str(pretrained)) if pretrained else ()
        return
    if not getattr(get_model(cell.model), "uses_features", False) or settings.get("visual_tokens") == 0:
        return
    encoder, feature_set, training = settings.get("encoder"), settings.get("feature_set"), settings.get("encoder_training")
    name = feature_set or (f"{encoder}-finetuned" if training == "finetuned" else encoder)
    if name is None:
        return
    made = folder is not None and any(feature_files(path / "features" / name) for path in (folder, derived_folder(folder)))
    if made and training != "end2end":
        return
    for part in name.split("+") if feature_set and "+" in feature_set else [encoder]:
        if part is not None:
            shape = {key: settings.get(key) for key in ("encoder_library", "encoder_model", "pretrained", "encoder_tokenizer")}
            own = load_yaml(properties_dir() / "encoder" / f"{part}.yaml")
            yield from _encoder(
                own.get("encoder_class") or part, tuple({**own, **(shape if part == encoder else {})}.get(k) for k in shape)
            )


@functools.cache
def _encoder(kind: str, shape: tuple) -> tuple[Need, ...]:
    """Weights of an encoder."""
    library, name, pretrained, tokenizer = shape
    found: list[Need] = []
    if kind == "vlmo" and tokenizer:
        from recbole_mm.encoder.wordpiece import WordPieces

        found += _tried(f"the vocabulary {tokenizer} of VLMo", True, lambda: WordPieces.load(tokenizer))
    if not pretrained or kind == "classic":
        return tuple(found)
    if kind == "clip" and library == "transformers" or kind == "sentence":
        return tuple([*found, *_clip_model(str(pretrained))])
    if find_weights(pretrained) is not None:
        return tuple(found)
    if kind == "clip":
        import open_clip

        from recbole_mm.encoder.clip import download

        tag = open_clip.get_pretrained_cfg(name, pretrained)
        found += _tried(f"the weights of CLIP {name} ({pretrained})", bool(tag.get("hf_hub")), lambda: download(name, pretrained, tag))
    elif kind == "cnn":
        import timm

        from recbole_mm.encoder.cnn import published

        config = timm.get_pretrained_cfg(name or "resnet50")
        found += _tried(f"the weights of {name} (timm)", True, lambda: published(name, config.to_dict()))
    elif kind == "vlmo":
        from recbole_mm.encoder.vlmo import SOURCE

        found.append(
            Need(f"the weights of VLMo ({weights_folder() / str(pretrained)})", str(missing_weights("VLMo", SOURCE, str(pretrained))))
        )
    return tuple(found)


def _clip_model(name: str) -> list[Need]:
    """A folder or repository in the form of transformers."""

    def load():
        if hub_or_path(name) is None:
            raise missing_weights(name, f"https://huggingface.co/{name} (config.json, model.safetensors, tokenizer files)", name)

    return _tried(f"the weights of {name}", True, load)


def _tried(what: str, network: bool, load) -> list[Need]:
    """Empty when `load` finds what it needs on this machine."""
    try:
        with _offline():
            load()
    except UserError as error:
        return [Need(what, str(error), fetched=network and online())]
    return []


# one encoder per modality


def combine(settings: Mapping[str, Any]) -> None:
    """Make the feature set ``a+b`` of a cell: what encoder a gives and what encoder b gives, each from its own property file.

    Raises:
        UserError: when both give the same modality, or one cannot be made.
    """
    from recbole_mm.encoder.extract import extract

    name = str(settings.get("feature_set") or "")
    if "+" not in name:
        return
    root = Path(Config(config_dict=dict(settings))["data_path"])
    if any(feature_files(path / "features" / name) for path in (root, derived_folder(root))):
        return
    target = derived_folder(root) / "features" / name
    with locked(target.with_name(f".{name}.lock")):
        if feature_files(target):
            return
        tables, ids_of, made = {}, {}, {}
        for part in name.split("+"):
            own = {key: value for key, value in settings.items() if key not in ("feature_set", "modalities")}
            config = Config(config_dict={**own, "encoder": part, "encoder_training": "frozen"})
            folder = next(
                (path / "features" / part for path in (root, derived_folder(root)) if feature_files(path / "features" / part)), None
            )
            folder = folder or extract(config, progress=False, every_modality=True)
            for modality, path in feature_files(folder).items():
                if modality in tables:
                    raise UserError(f"The encoders {name} both give {modality} features. Choose encoders of different modalities.")
                tables[modality], ids_of[modality], made[modality] = np.load(path, mmap_mode="r"), read_ids(folder) or [], part
        ids = list(dict.fromkeys(token for tokens in ids_of.values() for token in tokens))
        absent = {modality: [token for token in ids if token not in set(tokens)] for modality, tokens in ids_of.items()}
        rows = {m: align(tables[m], ids_of[m], ["[PAD]", *ids], "zero", f"{name}: {m}")[1:] for m in tables}
        write_feature_set(
            target, rows, ids, {"schema": 1, "combined": made, "missing": absent, "note": f"{META_FILE} of each encoder is in its own set"}
        )
