"""The registry of models: name -> where its class is. Classes are imported when asked for; unknown names go to RecBole."""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path

from recbole_mm.errors import UserError, nearest

ENTRY_POINTS = "recbole_mm.models"


@dataclass(frozen=True)
class ModelEntry:
    """Where a model is: `module`:`class_name`, its other names, one line about it, and its property file if it is not ours."""

    module: str
    class_name: str
    summary: str = ""
    aliases: tuple[str, ...] = ()
    property_file: str | None = None
    loaded: type | None = field(default=None, compare=False)

    def load(self) -> type:
        return self.loaded or getattr(importlib.import_module(self.module), self.class_name)


MODELS: dict[str, ModelEntry] = {
    "VBPR": ModelEntry("recbole_mm.model.vbpr", "VBPR", "general; matrix factorisation with a linear map of item features (AAAI 2016)"),
    "MMGCN": ModelEntry("recbole_mm.model.mmgcn", "MMGCN", "general; one graph network per modality (MM 2019)"),
    "MMGCL": ModelEntry("recbole_mm.model.mmgcl", "MMGCL", "general; graph contrastive learning with modality masking (2022)"),
    "SLMRec": ModelEntry("recbole_mm.model.slmrec", "SLMRec", "general; self-supervised multimodal graph learning (TMM 2022)"),
    "LATTICE": ModelEntry("recbole_mm.model.lattice", "LATTICE", "general; item-item graphs mined from features (MM 2021)"),
    "PerPEFTSASRec": ModelEntry(
        "recbole_mm.model.perpeft",
        "PerPEFTSASRec",
        "sequential; personalised parameter-efficient fine-tuning of CLIP with SASRec",
        aliases=("PerPEFT-SASRec", "PerPEFT"),
    ),
    "VIP5": ModelEntry("recbole_mm.model.vip5", "VIP5", "generative; sequential, direct and explanation tasks by prompts (EMNLP 2023)"),
}


def register_model(name: str, model: type | str, *, aliases=(), summary: str = "", property_file=None) -> None:
    """Add a model of another package, so that ``--model=<name>`` finds it.

    Args:
        name: the model's name; also the name of its class settings file unless `property_file` is given.
        model: the class, or ``"package.module:Class"`` to import it on demand.
        aliases: other names.
        summary: one line for ``--list models``.
        property_file: YAML file with the model's hyperparameters (RecBole's format).

    Raises:
        UserError: when the name or an alias is taken, or the property file does not exist.
    """
    entry = _entry(name, model, aliases, summary, property_file)
    taken = {n.lower() for n in (*MODELS, *(a for e in MODELS.values() for a in e.aliases), *recbole_model_names())}
    for candidate in (name, *aliases):
        if candidate.lower() in taken:
            raise UserError(f"register_model: the name {candidate!r} is taken by another model; choose another name.")
    MODELS[name] = entry


def _entry(name, model, aliases, summary, property_file) -> ModelEntry:
    if property_file is not None and not Path(property_file).is_file():
        raise UserError(f"register_model({name!r}): the property file {property_file} does not exist.")
    file = None if property_file is None else str(property_file)
    if isinstance(model, str):
        module, _, class_name = model.partition(":")
        return ModelEntry(module, class_name or name, summary, tuple(aliases), file)
    return ModelEntry(model.__module__, model.__name__, summary, tuple(aliases), file, loaded=model)


_entry_points_read = False


def _read_entry_points() -> None:
    """Add what installed packages declare in the group ``recbole_mm.models``; each entry point is a function that calls register_model."""
    global _entry_points_read
    if _entry_points_read:
        return
    _entry_points_read = True
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        point.load()()


def recbole_model_names() -> dict[str, str]:
    """RecBole's own models, name -> kind, read from its sources without importing them."""
    spec = importlib.util.find_spec("recbole.model")
    names = {}
    properties = Path(spec.origin).parent.parent / "properties" / "model"
    proper = {path.stem.lower(): path.stem for path in properties.glob("*.yaml")}
    for package in (
        "general_recommender",
        "context_aware_recommender",
        "sequential_recommender",
        "knowledge_aware_recommender",
        "exlib_recommender",
    ):
        kind = package.replace("_recommender", "").replace("_", "-").replace("exlib", "decision-tree")
        for module in pkgutil.iter_modules([str(Path(spec.origin).parent / package)]):
            source = Path(spec.origin).parent / package / f"{module.name}.py"
            stem = proper.get(module.name, module.name)  # xgboost.yaml belongs to the class XGBoost: a name in lower case says nothing
            names[stem if stem != module.name else _class_named(source, module.name)] = kind
    return names


def _class_named(path: Path, lower: str) -> str:
    """The class in the file at `path` whose lower-case name is `lower` (RecBole names files so); `lower` itself if there is none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("class ") and line[6:].split("(")[0].strip(": ").lower() == lower:
            return line[6:].split("(")[0].strip(": ")
    return lower


def find_model(name: str) -> tuple[str, ModelEntry | None]:
    """Return the proper name of the model called `name` (any case, or an alias) and our entry for it, None for RecBole's own.

    Raises:
        UserError: when neither we nor RecBole have it; names the nearest ones.
    """
    _read_entry_points()
    wanted = str(name).lower()
    for proper, entry in MODELS.items():
        if wanted in {proper.lower(), *(alias.lower() for alias in entry.aliases)}:
            return proper, entry
    theirs = {n.lower(): n for n in recbole_model_names()}
    if wanted in theirs:
        return theirs[wanted], None
    raise UserError(
        f"Unknown model {name!r}.{nearest(name, [*MODELS, *(a for e in MODELS.values() for a in e.aliases), *theirs.values()])} "
        "`recbole-mm --list models` shows all."
    )


def get_model(name: str) -> type:
    """Return the class of the model called `name`, ours or RecBole's; see :func:`find_model`."""
    proper, entry = find_model(name)
    if entry is not None:
        return entry.load()
    import torch
    from recbole.utils import get_model as recbole_get_model

    anomaly = torch.is_anomaly_enabled()
    found = recbole_get_model(proper)
    torch.autograd.set_detect_anomaly(anomaly)  # importing RecBole's SINE turns it on for everybody, and training takes twice the time
    return found
