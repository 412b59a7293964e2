"""Config: RecBole's configurator with our property files, typed values, and keys that are checked.

Layers, later ones win: RecBole's defaults, ``properties/overall.yaml``, the model's file, the dataset's file, the encoder's file, the
model file's ``per_dataset`` block, the user's files, the user's dict, the command line.
"""

import copy
import functools
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config as RecBoleConfig
from recbole.evaluator import metric_types
from recbole.utils import dataset_arguments, evaluation_arguments, general_arguments, training_arguments

from recbole_mm import distributed
from recbole_mm.errors import UserError, nearest
from recbole_mm.model import find_model, get_model
from recbole_mm.parsing import SettingsLoader, coerce, load_yaml, parse_arguments
from recbole_mm.paths import bundled_dataset_dir, properties_dir

#: optimizers that `learner` may name
LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam")
#: closed choices of our own keys
CHOICES = {
    "encoder_training": ("frozen", "finetuned", "end2end"),
    "missing_modality": ("error", "zero", "mean"),
    "eval_mask": ("all", "train"),
    "stop_on": ("metric", "loss"),
    "negative_items": ("all", "train"),
    "amp": (None, "bf16", "fp16"),
    "lr_schedule": (None, "step", "exponential", "cosine", "linear"),
}
#: smallest allowed values of numbers that every run reads
MINIMUM = {
    "epochs": 0, "train_batch_size": 1, "eval_batch_size": 1, "eval_step": 0, "stopping_step": 0, "weight_decay": 0, "worker": 0,
    "embedding_size": 1, "gradient_accumulation": 1, "eval_memory_mb": 1, "MAX_ITEM_LIST_LENGTH": 1, "metric_decimal_place": 0,
    "warmup_epochs": 0,
}  # fmt: skip
#: keys that Config computes, or that name the run rather than set it; they are not written to settings.yaml
COMPUTED = {
    "MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "device", "single_spec", "local_rank", "valid_neg_sample_args", "test_neg_sample_args",
    "valid_metric_bigger", "resume", "run_dir", "data_fingerprint", "world_size", "offset", "ip", "port", "nproc", "per_dataset",
}  # fmt: skip
#: keys of the command line that are no settings of a model
PROGRAM_KEYS = {"model", "dataset", "config_files", "resume", "nproc", "ip", "port", "world_size", "offset", "local_rank", "extra_keys"}


def _recbole_folder() -> Path:
    return Path(importlib.util.find_spec("recbole").origin).parent


@functools.cache
def listed_keys() -> frozenset[str]:
    """Every key that RecBole's argument lists and YAML files, or our property files, name."""
    keys = {*general_arguments, *training_arguments, *evaluation_arguments, *dataset_arguments, *PROGRAM_KEYS}
    files = [*(_recbole_folder() / "properties").rglob("*.yaml")]
    files += [p for p in properties_dir().rglob("*.yaml") if p.parent.name not in ("tuning", "benchmark", "vip5")]
    for path in files:
        keys.update(_top_keys(path))
    return frozenset(keys)


@functools.cache
def _top_keys(path: Path) -> frozenset[str]:
    """Keys at the left margin of a YAML file; reading lines is 50 times faster than parsing all of them."""
    return frozenset(re.findall(r"^([A-Za-z_]\w*)\s*:", path.read_text(encoding="utf-8"), re.M))


@functools.cache
def source_keys() -> frozenset[str]:
    """Keys that RecBole's own sources read from a config, listed or not."""
    pattern = re.compile(
        r"""config\[\s*["'](\w+)["']\s*\]|config\.(?:get|final_config_dict\.get)\(\s*["'](\w+)["']|["'](\w+)["'] (?:not )?in (?:self\.)?config\b|\bconfig\.([a-z]\w*)\b(?!\()"""
    )
    keys = set()
    for path in _recbole_folder().rglob("*.py"):
        for groups in pattern.findall(path.read_text(encoding="utf-8")):
            keys.update(group for group in groups if group)
    return frozenset(keys)


def is_known(key: str) -> bool:
    """Whether anybody reads `key`; RecBole's sources are searched only for keys that no list names."""
    return key in listed_keys() or key in source_keys()


class Config(RecBoleConfig):
    """The settings of one run; ``config["key"]`` as in RecBole.

    Args:
        model: model name (any case, or an alias) or class; else the key ``model`` of the settings given.
        dataset: dataset name; else the key ``dataset``.
        config_file_list: YAML files.
        config_dict: a dict of settings.
        arguments: words of a command line (``["--epochs=3", "--modalities", "visual"]``). ``sys.argv`` is never read.

    Raises:
        UserError: for an unknown key, model, dataset, learner, metric or choice, or a value of the wrong type.
    """

    def __init__(self, model=None, dataset=None, config_file_list=None, config_dict=None, arguments=None):
        self._arguments = list(arguments or [])
        self.origins: dict[str, str] = {}
        super().__init__(model, dataset, config_file_list, copy.deepcopy(dict(config_dict or {})))
        self._check_choices()

    # RecBole's seams, in the order in which its __init__ calls them

    def _init_parameters_category(self):
        super()._init_parameters_category()
        self.parameters = {name: list(keys) for name, keys in self.parameters.items()}  # RecBole appends to its global lists

    def _build_yaml_loader(self):
        return SettingsLoader  # RecBole adds its resolver to the global FullLoader

    def _convert_config_dict(self, config_dict):
        return config_dict  # RecBole evaluates strings as Python here; ours are typed against the defaults in _get_final_config_dict

    def _load_config_files(self, file_list):
        settings = {}
        for file in file_list or []:
            read = load_yaml(file)
            settings.update(read)
            self.origins.update({key: str(file) for key in read})
        return settings

    def _load_variable_config_dict(self, config_dict):
        self.origins.update({key: "config_dict" for key in config_dict or {}})
        return config_dict or {}

    def _load_cmd_line(self):
        read = parse_arguments(self._arguments)
        self.origins.update({key: "the command line" for key in read})
        return read

    def _get_model_and_dataset(self, model, dataset):
        external = self.external_config_dict
        model = model if model is not None else external.get("model")
        dataset = dataset if dataset is not None else external.get("dataset")
        if model is None or dataset is None:
            raise UserError(
                f"Expected a model and a dataset, got model={model!r} and dataset={dataset!r}. Name both, e.g. --model=VBPR --dataset=shop."
            )
        self._check_keys()
        if isinstance(model, str):
            self._model_name, self._model_entry = find_model(model)
            model_class = get_model(self._model_name)
        else:
            self._model_name, self._model_entry, model_class = model.__name__, None, model
        self._model_class = model_class
        self._find_data_path(str(dataset))
        return self._model_name, model_class, str(dataset)

    def _check_keys(self):
        extra = self.external_config_dict.get("extra_keys") or []
        allowed = {extra} if isinstance(extra, str) else set(extra)
        unknown = [key for key in self.external_config_dict if key not in allowed and not is_known(key)]
        if unknown:
            key = unknown[0]
            raise UserError(
                f"Unknown key {key!r} from {self.origins[key]}.{nearest(key, listed_keys())} "
                f"Nothing reads it; if your own code does, add extra_keys: [{key}]."
            )

    def _find_data_path(self, dataset: str) -> None:
        """Settle where the dataset's folder is: `data_path`, else ``dataset/`` here, else the bundled samples."""
        given = self.external_config_dict.get("data_path")
        if Path(dataset).name != dataset or dataset in ("", ".", ".."):
            raise UserError(f"Expected the name of a dataset, got {dataset!r}. Give the folder it lies in with --data_path.")
        roots = [Path(str(given))] if given is not None else [Path("dataset"), bundled_dataset_dir()]
        self._data_root = next((root for root in roots if (root / dataset).is_dir()), None)
        if self._data_root is None:
            if dataset == "ml-100k" or dataset in self._downloadable():
                self._data_root = roots[0]
            else:
                there = sorted({p.name for root in roots if root.is_dir() for p in root.iterdir() if p.is_dir()})
                raise UserError(
                    f"Unknown dataset {dataset!r}: no folder {' or '.join(str(root / dataset) for root in roots)}.{nearest(dataset, there)} "
                    f"There: {', '.join(there) or 'nothing'}. Set --data_path to the folder that holds the dataset's folder."
                )
        self.external_config_dict["data_path"] = str(self._data_root.resolve())

    @staticmethod
    @functools.cache
    def _downloadable() -> frozenset[str]:
        """Names of datasets that RecBole itself downloads."""
        folder = _recbole_folder() / "properties" / "dataset"
        return _top_keys(folder / "url.yaml") | frozenset(
            re.findall(r"^([\w-]+):", (folder / "url.yaml").read_text(encoding="utf-8"), re.M)
        )

    def _load_internal_config_dict(self, model, model_class, dataset):
        super()._load_internal_config_dict(model, model_class, dataset)
        self._defaults = dict(self.internal_config_dict)
        labeled = (self.internal_config_dict.get("eval_args") or {}).get("mode") == "labeled"  # context-aware models: AUC and LogLoss
        family = {key: self.internal_config_dict[key] for key in ("metrics", "valid_metric")} if labeled else {}
        folder = properties_dir()
        model_file = (
            Path(self._model_entry.property_file)
            if self._model_entry and self._model_entry.property_file
            else folder / "model" / f"{model}.yaml"
        )
        per_dataset = {}
        own = self._data_root / dataset / f"{dataset}.yaml"  # the dataset's own file, as recbole-mm convert writes it
        for path in (folder / "overall.yaml", model_file, folder / "dataset" / f"{dataset}.yaml", own):
            if path.is_file():
                read = load_yaml(path)
                if path == own and (unknown := [key for key in read if not is_known(key)]):
                    raise UserError(f"Unknown key {unknown[0]!r} in {own}.{nearest(unknown[0], listed_keys())}")
                if path == model_file:
                    per_dataset = (read.pop("per_dataset", None) or {}).get(dataset) or {}
                self.internal_config_dict.update(read)
                if path == folder / "overall.yaml":
                    self.internal_config_dict.update(family)  # our ranking metrics need candidates, which this evaluation has not
        encoder = {**self.internal_config_dict, **per_dataset, **self.external_config_dict}.get("encoder")
        if encoder is not None:
            path = folder / "encoder" / f"{encoder}.yaml"
            if not path.is_file():
                names = [p.stem for p in (folder / "encoder").glob("*.yaml")]
                raise UserError(
                    f"Unknown encoder {encoder!r}.{nearest(encoder, names)} There are {', '.join(sorted(names))}. "
                    "For a feature set of your own under features/, set --feature_set instead."
                )
            self.internal_config_dict.update(load_yaml(path))
        self._defaults = {**self.internal_config_dict}  # what a user's value is typed against
        self.internal_config_dict.update(per_dataset)
        self.internal_config_dict["MODEL_TYPE"] = model_class.type

    def _get_final_config_dict(self):
        final = copy.deepcopy(self.internal_config_dict)
        for key, value in self.external_config_dict.items():
            default = (
                None
                if key in ("train_neg_sample_args", "topk", "metrics", "gpu_id", "transform", "additional_feat_suffix")
                else self._defaults.get(key)
            )
            final[key] = coerce(key, value, default, self.origins.get(key, "config_dict"))
        if isinstance(final.get("modalities"), str):
            final["modalities"] = [name.strip() for name in final["modalities"].split(",") if name.strip()]
        if isinstance(final.get("metrics"), str):
            final["metrics"] = [name.strip() for name in final["metrics"].split(",")]
        if final.get("train_neg_sample_args") in ("None", "none"):
            final["train_neg_sample_args"] = None
        self._adapt_loss(final)
        self.user_settings = {key: final[key] for key in self.external_config_dict if key in self.origins and key not in COMPUTED}
        self._check_metrics(final)
        return final

    def _adapt_loss(self, final: dict) -> None:
        """Models that rank over the whole catalogue draw no negatives: RecBole stops such a run unless told; only a user's own value should."""
        whole = final.get("loss_type") == "CE" and not hasattr(self._model_class, "input_type")
        if whole and "train_neg_sample_args" not in self.origins:
            final["train_neg_sample_args"] = None

    def _check_metrics(self, final: dict) -> None:
        for metric in final["metrics"]:
            if str(metric).lower() not in metric_types:
                raise UserError(
                    f"Unknown metric {metric!r} in metrics.{nearest(metric, metric_types)} There are {', '.join(sorted(metric_types))}."
                )
        if (
            isinstance(final["topk"], str)
            or isinstance(final["topk"], bool)
            or not all(isinstance(k, int) and k > 0 for k in _as_list(final["topk"]))
        ):
            raise UserError(
                f"topk: expected whole numbers above 0, got {final['topk']!r} from {self.origins.get('topk', 'the property files')}."
            )
        final["topk"] = _as_list(final["topk"])
        wanted = str(final["valid_metric"])
        if getattr(self._model_class, "valid_metrics", None) is not None:
            names = self._model_class.valid_metrics(final)
        else:
            names = {str(m).lower() for m in final["metrics"]} | {f"{str(m).lower()}@{k}" for m in final["metrics"] for k in final["topk"]}
        if wanted.lower() not in {name.lower() for name in names}:
            if "valid_metric" not in self.origins and "@" in wanted and ("metrics" in self.origins or "topk" in self.origins):
                metric = str(final["metrics"][0])
                final["valid_metric"] = f"{metric}@{max(final['topk'])}" if f"{metric.lower()}@{max(final['topk'])}" in names else metric
                if final["metrics"][0].lower() in {"auc", "logloss", "mae", "rmse"}:
                    final["valid_metric"] = metric
                return
            raise UserError(f"valid_metric: expected one of the metrics at one of the k in topk, got {wanted!r}.{nearest(wanted, names)}")

    def _set_default_parameters(self):
        try:
            super()._set_default_parameters()
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(str(error)) from None  # RecBole's own checks of user settings

    def _init_device(self):
        """RecBole's choice of the device; of several processes each has its own, and they meet here. RecBole's way would assume nccl."""
        if distributed.planned()[0] > 1:
            return self._init_device_of_several()
        nproc = self.external_config_dict.get("nproc")
        if nproc not in (None, 1, "1"):
            raise UserError(f"nproc: {nproc} processes have to be started: use --nproc={nproc} of the command line, or torchrun.")
        if not self.final_config_dict["use_gpu"]:
            self.final_config_dict["gpu_id"] = ""
        if isinstance(self.final_config_dict["gpu_id"], list):
            self.final_config_dict["gpu_id"] = tuple(self.final_config_dict["gpu_id"])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        super()._init_device()
        if visible is not None and not torch.cuda.is_available():
            os.environ["CUDA_VISIBLE_DEVICES"] = visible

    def _init_device_of_several(self):
        final = self.final_config_dict
        if final["use_gpu"] and "gpu_id" in self.origins:  # else every GPU that the environment shows
            ids = final["gpu_id"]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, ids)) if isinstance(ids, (list, tuple)) else str(ids)
        final["gpu_id"] = str(final["gpu_id"])
        final["device"] = distributed.choose_device(bool(final["use_gpu"]))
        final["single_spec"], final["local_rank"] = True, 0  # RecBole's own way of several processes stays off: ours is in the trainer
        distributed.start(final["device"])

    def _set_train_neg_sample_args(self):
        try:
            super()._set_train_neg_sample_args()
        except ValueError as error:
            raise UserError(str(error)) from None

    def _set_eval_neg_sample_args(self, phase):
        try:
            super()._set_eval_neg_sample_args(phase)
        except ValueError as error:
            raise UserError(str(error)) from None

    def _check_choices(self) -> None:
        final = self.final_config_dict
        for key, allowed in CHOICES.items():
            if final.get(key) not in allowed and key in final:
                shown = ", ".join("null" if a is None else a for a in allowed)
                raise UserError(
                    f"{key}: expected one of {shown}, got {final[key]!r} from {self.origins.get(key, 'the property files')}.{nearest(final[key], [a for a in allowed if a])}"
                )
        learner = str(final["learner"]).lower()
        if learner not in LEARNERS:
            raise UserError(f"Unknown learner {final['learner']!r}.{nearest(learner, LEARNERS)} There are {', '.join(LEARNERS)}.")
        for key, low in MINIMUM.items():
            value = final.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= low:
                raise UserError(
                    f"{key}: expected a number of at least {low}, got {value} from {self.origins.get(key, 'the property files')}."
                )
        rate = final["learning_rate"]
        if not (isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 < rate < math.inf):
            raise UserError(
                f"learning_rate: expected a number above 0, got {rate!r} from {self.origins.get('learning_rate', 'the property files')}."
            )
        if final["encoder_training"] == "end2end" and final.get("encoder") is None:
            raise UserError(
                "encoder_training: end2end trains an encoder, but none is named. Add --encoder=clip (or another; `recbole-mm --list encoders`)."
            )

    # what runs and checkpoints keep

    def settings(self) -> dict[str, Any]:
        """Every setting as plain values; ``Config(config_dict=settings)`` gives the same run wherever property files have moved to."""
        plain = {key: copy.deepcopy(value) for key, value in self.final_config_dict.items() if key not in COMPUTED and _is_plain(value)}
        plain["data_path"] = str(self._data_root.resolve())
        if self.final_config_dict["train_neg_sample_args"]["distribution"] == "none":
            plain["train_neg_sample_args"] = None
        known = set(_as_list(plain.get("extra_keys")) if plain.get("extra_keys") else [])
        plain["extra_keys"] = sorted(known) or None
        return plain


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else list(value) if isinstance(value, tuple) else [value]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, (str, int)) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, (str, int, float, bool))
