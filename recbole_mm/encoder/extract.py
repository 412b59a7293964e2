"""Pictures and texts of a dataset to a feature set: decoded in worker processes, duplicates encoded once, resumable, in shards.

The distinct pictures and the distinct texts (shortest first, so that a batch holds little padding) are cut into parts of fixed size. Each
part is encoded and written to a file of its own; a run that was killed finds the finished parts and makes only the others, and processes
under torchrun share the parts out by rank. What a part holds depends on nothing but the inputs and the settings, so the result is the
same to the bit however often it was interrupted and however many processes made it.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from recbole_mm import distributed
from recbole_mm.config import Config
from recbole_mm.data.content import ItemContent, open_picture
from recbole_mm.data.features import META_FILE, feature_files, set_folder, set_name, set_names, write_feature_set
from recbole_mm.encoder import build_encoder
from recbole_mm.encoder.base import Encoder
from recbole_mm.errors import UserError
from recbole_mm.files import atomic_path, locked, write_json
from recbole_mm.memory import keep_freed_memory
from recbole_mm.parsing import load_yaml, parse_arguments
from recbole_mm.record import versions

PART = 256  # inputs per part: what a killed run loses at most
PRECISIONS = ("auto", "fp32", "bf16")
#: keys of encoders that say how to run or train them, not what comes out
_NOT_SHAPING = {
    "encoder_learning_rate", "encoder_weight_decay", "encoder_freeze_blocks", "encoder_gradient_checkpointing", "encoder_micro_batch",
    "encoder_batch_size", "encoder_precision", "encoder_workers", "encoder_training", "encoder_seed",
}  # fmt: skip


def encoder_settings(config) -> dict[str, Any]:
    """The settings that an encoder is built from."""
    final = config.final_config_dict
    return {key: value for key, value in final.items() if key.startswith("encoder_") or key in ("pretrained", "feature")}


def shaping_settings(config) -> dict[str, Any]:
    """The settings that decide what a feature set holds; they stand in its meta.json."""
    shaping = {key: value for key, value in encoder_settings(config).items() if key not in _NOT_SHAPING}
    shaping.update(text_fields=config["text_fields"], image_folder=config["image_folder"])
    if "pretrained" in shaping and shaping["pretrained"] is None:
        shaping["seed"] = weights_seed(config)
    return json.loads(json.dumps(shaping))


def weights_seed(config) -> int:
    """The seed that random weights of an encoder are drawn from: ``encoder_seed``, else the run's."""
    return config["seed"] if config["encoder_seed"] is None else config["encoder_seed"]


def fast_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bf16 matrices in hardware; elsewhere bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def choose_precision(encoder: Encoder, wanted: str | None, device: torch.device) -> str:
    """fp32 or bf16 for `encoder` on `device`; an encoder without weights always gets fp32."""
    wanted = wanted or "auto"
    if wanted not in PRECISIONS:
        raise UserError(f"encoder_precision: expected one of {', '.join(PRECISIONS)}, got {wanted!r}.")
    if not any(True for _ in encoder.parameters()):
        return "fp32"
    return ("bf16" if fast_bf16(device) else "fp32") if wanted == "auto" else wanted


def batch_size(wanted: int | None, modality: str, device: torch.device) -> int:
    """Inputs per batch: `wanted`, or what suits the device.

    On the CPU a batch of 16 pictures keeps the widest activations of ViT-B/16 in bf16 below the 32 MiB up to which `keep_freed_memory` can
    spare their page faults; 32 pictures are slower. Texts are shorter.
    """
    if wanted:
        return wanted
    if device.type == "cuda":
        return 256
    return 32 if modality == "textual" else 16


class _Pictures(Dataset):
    """Decoded and prepared pictures; a broken one comes back as its reason."""

    def __init__(self, paths: list[Path], prepare: Callable[[Image.Image], Tensor]):
        self.paths, self.prepare = paths, prepare

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index: int):
        try:
            return self.prepare(open_picture(self.paths[index]))
        except UserError as error:
            return str(error)


def _as_they_are(rows: list) -> list:
    return rows


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


class _Work:
    """Distinct inputs of one modality: which items each one serves, in the order in which they are encoded."""

    def __init__(self, modality: str, keys: dict[int, str], tokens: list[str]):
        self.modality = modality
        order: dict[str, int] = {}
        self.row_of_item = {item: order.setdefault(key, len(order)) for item, key in keys.items()}
        first = {}
        for item, row in self.row_of_item.items():
            first.setdefault(row, item)
        self.items = [first[row] for row in range(len(order))]  # one item that has the input
        self.hash = hashlib.sha256(json.dumps([[tokens[item], key] for item, key in keys.items()]).encode()).hexdigest()

    def reorder(self, order: np.ndarray) -> None:
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        self.row_of_item = {item: int(place[row]) for item, row in self.row_of_item.items()}
        self.items = [self.items[row] for row in order]

    def parts(self) -> list[range]:
        return [range(begin, min(begin + PART, len(self.items))) for begin in range(0, len(self.items), PART)]


def _file_key(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.sha256(stream.read()).hexdigest()


def _plan(content: ItemContent, encoder: Encoder, modalities: list[str]) -> tuple[dict[str, _Work], Tensor | None]:
    """What is to be encoded for each modality, and the prepared texts by item id."""
    items = range(1, len(content.tokens))
    pictures = {item: path for item in items if (path := content.image_path(item)) is not None}
    texts = {item: text for item in items if (text := content.text(item)).strip()} if content.has_texts else {}
    works: dict[str, _Work] = {}
    prepared = None
    if any(name != "visual" for name in modalities) and texts:
        distinct = list(dict.fromkeys(texts.values()))
        rows = torch.cat([encoder.tokenize(distinct[begin : begin + 1024]) for begin in range(0, len(distinct), 1024)])
        number = {text: row for row, text in enumerate(distinct)}
        prepared = rows[torch.tensor([number.get(texts.get(item, ""), 0) for item in range(len(content.tokens))])]
    keys = {item: _file_key(path) for item, path in pictures.items()} if any(name != "textual" for name in modalities) else {}
    for name in modalities:
        if name == "textual":
            works[name] = _Work(name, texts, content.tokens)
            if prepared is not None and not prepared.is_floating_point():
                lengths = (prepared[works[name].items] != 0).sum(1).numpy()
                works[name].reorder(np.argsort(lengths, kind="stable"))
        elif name == "visual":
            works[name] = _Work(name, keys, content.tokens)
        else:  # joint needs both
            works[name] = _Work(name, {item: keys[item] + "\n" + texts[item] for item in keys if item in texts}, content.tokens)
    return works, prepared


def _batches(content, encoder, work: _Work, parts: list[range], prepared, batch: int, workers: int, device) -> Iterator[tuple[range, list]]:
    """Yield (rows, inputs) in order: pictures as tensors or reasons, texts as prepared rows."""
    cuts = [range(begin, min(begin + batch, part.stop)) for part in parts for begin in range(part.start, part.stop, batch)]
    if work.modality == "textual":
        for rows in cuts:
            yield rows, [None, prepared[[work.items[row] for row in rows]]]
        return
    transform = getattr(encoder, "transform", None)
    dataset = _Pictures(
        [content.image_path(item) for item in work.items], transform.resize if transform is not None else encoder.preprocess
    )
    count = sum(len(rows) for rows in cuts)
    loader = DataLoader(
        dataset,
        batch_sampler=[list(rows) for rows in cuts],
        collate_fn=_as_they_are,
        num_workers=workers if count > 2 * batch else 0,
        worker_init_fn=_one_thread,
        pin_memory=False,
        **({"prefetch_factor": 4} if workers and count > 2 * batch else {}),
    )
    for rows, pictures in zip(cuts, loader):
        yield rows, [pictures, prepared[[work.items[row] for row in rows]] if work.modality == "joint" else None]


@torch.inference_mode()
def _encode(encoder, modality: str, pictures, texts, device) -> tuple[Tensor, dict[int, str]]:
    """Features of one batch [b, F] float32 and the reasons of the pictures that could not be read (their rows are zero)."""
    broken: dict[int, str] = {}
    images = None
    good = list(range(len(pictures if pictures is not None else texts)))
    if pictures is not None:
        broken = {row: picture for row, picture in enumerate(pictures) if isinstance(picture, str)}
        good = [row for row in good if row not in broken]
        if good:
            images = torch.stack([pictures[row] for row in good]).to(device)
            if getattr(encoder, "transform", None) is not None:
                images = encoder.transform.normalize(images)
    size = len(pictures if pictures is not None else texts)
    rows = torch.zeros(size, encoder.feature_dims[modality])
    if good:
        words = None if texts is None else texts[good].to(device)
        if words is not None and not words.is_floating_point():
            words = words.long()
        rows[good] = encoder.encode(images, words)[modality].float().cpu()
    return rows, broken


def extract(config, folder: Path | None = None, *, progress: bool = True, overwrite: bool = False, every_modality: bool = False) -> Path:
    """Encode the pictures and texts of a dataset with the encoder of `config` and write the feature set.

    Args:
        config: names dataset and encoder; reads ``encoder_precision``, ``encoder_batch_size``, ``encoder_workers``, ``modalities``.
        folder: where the set goes; by default where the run looks for it.
        progress: show a bar with rate and remaining time.
        overwrite: make it again where a whole one exists.
        every_modality: all that the encoder gives and the dataset has, whatever ``modalities`` selects.

    Returns:
        the folder of the set.

    Raises:
        UserError: when the dataset has neither pictures nor texts for the encoder, or a different set of that name exists.
    """
    if config["encoder"] is None:
        raise UserError("extract needs --encoder, e.g. --encoder=classic.")
    folder = Path(folder) if folder is not None else set_folder(config)
    chosen = None if every_modality else config["modalities"]
    rank, processes = distributed.world()
    if processes == 1 and not overwrite and _finished(folder, config, chosen):
        return folder  # without the lock: the folder may be one that nobody can write to
    with locked(folder.with_name(f".{folder.name}.lock")) if rank == 0 else nullcontext():
        distributed.barrier()  # from here on nobody but us writes the set, so all ranks find the same
        if overwrite or not _finished(folder, config, chosen):
            _extract(config, folder, chosen, rank, processes, progress, overwrite)
    return folder


def _finished(folder: Path, config, chosen: Sequence[str] | None) -> bool:
    """Whether `folder` is a whole set with the modalities `chosen`, made with the same settings; other settings are an error."""
    if not (folder / META_FILE).is_file() or not feature_files(folder):
        return False
    check_same(folder, shaping_settings(config))
    return set(chosen or ()) <= set(feature_files(folder))


def _extract(config, folder: Path, chosen: Sequence[str] | None, rank: int, processes: int, progress: bool, overwrite: bool) -> None:
    """Encode the modalities `chosen` (all that can be, if None) into `folder`, and those it has already; the set's lock is held."""
    keep_freed_memory()
    name, shaping = config["encoder"], shaping_settings(config)
    device = torch.device(config["device"])
    content = ItemContent.catalogue(config)
    if not content.has_images and not content.has_texts:
        raise UserError(
            f"{config['dataset']!r} has neither pictures ({content.folder / (config['image_folder'] or 'images')}) nor texts (columns {', '.join(content.text_fields)} of {config['dataset']}.item); there is nothing to encode."
        )
    torch.manual_seed(weights_seed(config))
    encoder = build_encoder(name, encoder_settings(config))
    encoder.fit(content)
    there = {"visual": content.has_images, "textual": content.has_texts}
    able = [m for m in encoder.modalities if all(there.values()) or there.get(m, False)]
    before = [] if overwrite or not chosen else list(feature_files(folder))  # made again with the others: all tables have the same items
    wanted = [m for m in [*before, *(m for m in chosen or able if m not in before)] if before or m in encoder.modalities]
    lacking = [m for m in wanted if m not in able]
    if lacking or not wanted:
        raise UserError(
            f"{name} cannot encode {', '.join(lacking or chosen or encoder.modalities)} of {config['dataset']!r}: the dataset has {' and '.join(k for k, v in (('pictures', there['visual']), ('texts', there['textual'])) if v)}, the encoder gives {', '.join(encoder.modalities)}."
        )
    encoder.to(device).eval()
    precision = choose_precision(encoder, config["encoder_precision"], device)
    if precision == "bf16":
        encoder.to(torch.bfloat16)
    batches = {modality: batch_size(config["encoder_batch_size"], modality, device) for modality in wanted}
    workers = config["encoder_workers"] if config["encoder_workers"] is not None else min(os.cpu_count() or 1, 8)
    works, prepared = _plan(content, encoder, wanted)
    key = {"shaping": shaping, "fingerprint": encoder.fingerprint(), "precision": precision, "batch": batches, "part": PART}
    key["inputs"] = {m: [len(work.items), work.hash] for m, work in works.items()}
    partial = folder.with_name(f".{folder.name}.partial")
    _begin_partial(partial, key, rank)

    total = sum(len(work.items) for work in works.values())
    done = sum(len(part) for m, work in works.items() for part in work.parts() if _part_file(partial, m, part).is_file())
    bar = tqdm(total=total, initial=done, desc=f"Encode with {name}", unit="input", ncols=100, disable=not progress or rank > 0)
    for modality, work in works.items():
        mine = [part for number, part in enumerate(work.parts()) if number % processes == rank]
        todo = [part for part in mine if not _part_file(partial, modality, part).is_file()]
        rows: list[Tensor] = []
        broken: dict[str, str] = {}
        queue = iter(todo)
        part = next(queue, None)
        for place, (pictures, texts) in _batches(content, encoder, work, todo, prepared, batches[modality], workers, device):
            features, reasons = _encode_halving(encoder, modality, pictures, texts, device)
            rows.append(features)
            broken.update({str(place.start + row): reason for row, reason in reasons.items()})
            bar.update(len(place))
            if place.stop == part.stop:
                _write_part(partial, modality, part, torch.cat(rows), broken)
                rows, broken, part = [], {}, next(queue, None)
    bar.close()
    distributed.barrier()
    if rank == 0:
        _merge(partial, folder, content, encoder, works, precision, shaping)
    distributed.barrier()


def _encode_halving(encoder, modality, pictures, texts, device) -> tuple[Tensor, dict[int, str]]:
    """Encode a batch; where the GPU's memory does not hold it, in halves."""
    try:
        return _encode(encoder, modality, pictures, texts, device)
    except torch.OutOfMemoryError:
        size = len(pictures if pictures is not None else texts)
        if size == 1:
            raise UserError(
                "One picture or text does not fit into the GPU's memory with this encoder. Take a smaller one, or --use_gpu=False."
            ) from None
        torch.cuda.empty_cache()
    half = size // 2
    first, b1 = _encode_halving(encoder, modality, pictures and pictures[:half], None if texts is None else texts[:half], device)
    second, b2 = _encode_halving(encoder, modality, pictures and pictures[half:], None if texts is None else texts[half:], device)
    return torch.cat([first, second]), {**b1, **{row + half: reason for row, reason in b2.items()}}


def _part_file(partial: Path, modality: str, part: range) -> Path:
    return partial / f"{modality}-{part.start:09d}-{part.stop:09d}.npy"


def _write_part(partial: Path, modality: str, part: range, rows: Tensor, broken: dict[str, str]) -> None:
    path = _part_file(partial, modality, part)
    if broken:
        write_json(path.with_suffix(".json"), broken)
    with atomic_path(path) as temporary:
        np.save(temporary, rows.numpy())


def _begin_partial(partial: Path, key: dict, rank: int) -> None:
    """Keep finished parts of the same work, drop those of any other."""
    text = json.dumps(key, sort_keys=True, default=str)
    if rank == 0:
        for left in partial.parent.glob(f".{partial.stem.lstrip('.')}.new-*"):  # of a run that was killed while it moved a set to its place
            shutil.rmtree(left, ignore_errors=True)
        plan = partial / "plan.txt"
        if partial.is_dir() and (not plan.is_file() or plan.read_text(encoding="utf-8") != text):
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        with atomic_path(plan) as temporary:
            temporary.write_text(text, encoding="utf-8")
    distributed.barrier()


def _merge(partial, folder, content, encoder, works, precision, shaping) -> None:
    """One table per modality from the parts; items without input, or with a broken one, are listed in meta.json and have zeros."""
    items = [item for item in range(1, len(content.tokens)) if any(item in work.row_of_item for work in works.values())]
    tables, missing, broken = {}, {}, {}
    for modality, work in works.items():
        rows = (
            np.concatenate([np.load(_part_file(partial, modality, part), allow_pickle=False) for part in work.parts()])
            if work.items
            else np.zeros((0, 1), np.float32)
        )
        reasons: dict[int, str] = {}
        for part in work.parts():
            file = _part_file(partial, modality, part).with_suffix(".json")
            if file.is_file():
                reasons.update({int(row): reason for row, reason in json.loads(file.read_text(encoding="utf-8")).items()})
        table = np.zeros((len(items), encoder.feature_dims[modality]), np.float32)
        absent = []
        for place, item in enumerate(items):
            row = work.row_of_item.get(item)
            if row is None or row in reasons:
                absent.append(content.tokens[item])
                if row is not None:
                    broken.setdefault(modality, {})[content.tokens[item]] = reasons[row]
            else:
                table[place] = rows[row]
        tables[modality], missing[modality] = table, absent
    meta = {
        "schema": 1,
        "encoder": encoder.fingerprint(),
        "settings": shaping,
        "precision": precision,
        "versions": versions(),
        "inputs": {m: {"items": len(work.row_of_item), "distinct": len(work.items), "sha256": work.hash} for m, work in works.items()},
        "missing": missing,
        "broken": broken,
    }
    write_feature_set(folder, tables, [content.tokens[item] for item in items], meta)
    shutil.rmtree(partial)


def check_same(folder: Path, shaping: dict[str, Any]) -> None:
    """Whether the feature set in `folder` was made with these settings.

    Raises:
        UserError: when it was not: using it would make the record of the run wrong.
    """
    path = folder / META_FILE
    if not path.is_file():
        return
    made = json.loads(path.read_text(encoding="utf-8")).get("settings")
    if made is None:
        return
    differing = [key for key in {**made, **shaping} if key in made and key in shaping and made[key] != shaping[key]]
    if differing:
        key = differing[0]
        share = f" To use it as it is, say so: --encoder_seed={made[key]} (its weights are random)." if key == "seed" else ""
        raise UserError(
            f"The feature set {folder} was made with {key}={made[key]!r}, this run asks for {shaping[key]!r}. Give the new one its own name "
            f"with --feature_set, or make it again with `recbole-mm extract --overwrite`.{share}"
        )


def ensure_features(config) -> None:
    """Make the feature set of a run that has pictures or texts but no features; check that an existing set was made with its settings.

    A run that names no encoder takes the features in the dataset's folder. Where there are none, it gets those of ``classic``, which needs
    no weights; ``config["encoder"]`` says so from then on.
    """
    if config["encoder_training"] != "frozen":
        return
    if config["encoder"] is None:
        if config["feature_set"] or feature_files(Path(config["data_path"])):
            return
        content = ItemContent.catalogue(config)
        if not content.has_images and not content.has_texts:
            return
        config["encoder"] = "classic"
        others = [name for name in set_names(config) if name != "classic"]
        logging.getLogger().warning(
            f"No encoder named and no features in {config['data_path']}: taking --encoder=classic"
            + (f" (there are also the feature sets {', '.join(others)})." if others else ".")
        )
    folder = set_folder(config)
    there = distributed.on_main(lambda: feature_files(folder))  # the others may look when the first has begun to write
    if not there:
        extract(config, folder, progress=bool(config["show_progress"]), every_modality=True)
    elif set_name(config) == config["encoder"]:
        check_same(folder, shaping_settings(config))
        beside = feature_files(Path(config["data_path"]))
        lacking = [name for name in config["modalities"] or () if name not in there and name not in beside]
        if lacking and (folder / META_FILE).is_file():
            extract(config, folder, progress=bool(config["show_progress"]))


def main(arguments: list[str]) -> int:
    """``recbole-mm extract --dataset=shop --encoder=clip [--feature_set=name] [--modalities=visual,textual] [--feature=cls|raw|projected]
    [--encoder_precision=auto|fp32|bf16] [--encoder_batch_size=16] [--encoder_workers=2] [--nproc=1] [--overwrite]``: encode the pictures
    and texts of a dataset into ``<dataset>/features/<feature_set>/``. A killed run continues where it stopped when it is started again.
    """
    given = parse_arguments(arguments)
    overwrite = bool(given.get("overwrite", False))
    files = given.get("config_files")
    skip = ("overwrite", "config_files")
    words = [f"--{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in given.items() if key not in skip]
    files = files.replace(",", " ").split() if isinstance(files, str) else files
    external = set(given) | {key for file in files or [] for key in load_yaml(file)}
    config = Config("VBPR" if "model" not in external else None, None if "dataset" in external else "shop", files, None, words)
    before = feature_files(set_folder(config)) and not overwrite
    folder = extract(config, overwrite=overwrite)
    if distributed.is_main():
        _say(folder, existed=bool(before))
    return 0


def _say(folder: Path, existed: bool) -> None:
    meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    for name, output in meta["outputs"].items():
        absent, broken = len(meta["missing"].get(name, [])), len(meta["broken"].get(name, {}))
        extra = f", {absent} without ({broken} of them broken; listed in {META_FILE})" if absent else ""
        print(f"{name}: {output['rows']} items x {output['columns']}{extra}")
    print(f"{'Already there' if existed else 'Written'}: {folder} ({meta['precision']})")
