"""run(): settings -> dataset -> loaders -> model -> trainer -> result; load_model(): a finished run, ready to use."""

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import recbole.data.dataset as recbole_datasets
import yaml
from recbole.utils import ModelType, dict2str, init_seed

from recbole_mm import checkpoint, distributed
from recbole_mm.config import Config
from recbole_mm.data.dataset import MultimodalDataset, MultimodalSequentialDataset
from recbole_mm.data.loader import data_preparation
from recbole_mm.encoder.extract import ensure_features
from recbole_mm.errors import UserError
from recbole_mm.files import clear_leftovers, write_text
from recbole_mm.logs import run_log
from recbole_mm.model import get_model
from recbole_mm.parsing import load_yaml
from recbole_mm.record import data_fingerprint, new_run_dir, peak_memory, plain_metrics, versions, write_per_user, write_result
from recbole_mm.trainer import trainer_class_for


class LoadedRun(NamedTuple):
    """A finished run: its settings, the model with the weights of the best epoch, the dataset and its loaders."""

    config: Config
    model: Any
    dataset: Any
    train_data: Any
    valid_data: Any
    test_data: Any


def create_dataset(config):
    """The dataset of a run: the class its model names, else RecBole's choice with our features and contents on top.

    RecBole's own function reads a pickled dataset if one lies in the checkpoint folder; this one never reads a pickle.
    """
    if config["save_dataset"] or config["dataset_save_path"]:
        raise UserError(
            "save_dataset: pickled datasets are neither written nor read, because reading a pickle runs code. Remove the setting."
        )
    model_class = get_model(config["model"])
    own = getattr(model_class, "dataset_class", None)
    if own is None:
        own = getattr(recbole_datasets, f"{config['model']}Dataset", None)
    if own is None:
        own = {
            ModelType.GENERAL: MultimodalDataset,
            ModelType.TRADITIONAL: MultimodalDataset,
            ModelType.SEQUENTIAL: MultimodalSequentialDataset,
            ModelType.KNOWLEDGE: recbole_datasets.KnowledgeBasedDataset,
            ModelType.DECISIONTREE: recbole_datasets.DecisionTreeDataset,
        }.get(config["MODEL_TYPE"], recbole_datasets.Dataset)
    return own(config)


def _prepare(config: Config) -> tuple[Any, Any, Any, Any]:
    """Dataset and loaders, drawn from the run's seed."""
    if getattr(get_model(config["model"]), "uses_features", False):
        ensure_features(config)
    init_seed(config["seed"], config["reproducibility"])
    with warnings.catch_warnings():  # pandas 3 hands out read-only arrays; RecBole makes tensors of them and writes into none
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        dataset = create_dataset(config)
        config["data_fingerprint"] = data_fingerprint(dataset)
        return dataset, *data_preparation(config, dataset)


def _build_model(config: Config, train_data):
    init_seed(config["seed"], config["reproducibility"])
    return get_model(config["model"])(config, train_data._dataset).to(config["device"])


def read_settings(run_dir: str | Path) -> dict[str, Any]:
    """The full settings of a run.

    Raises:
        UserError: when `run_dir` is no run directory.
    """
    file = Path(run_dir) / "settings.yaml"
    if not file.is_file():
        raise UserError(
            f"{run_dir} is no run directory: it has no settings.yaml. Runs are the folders under checkpoint_dir (default: saved)."
        )
    return load_yaml(file)


def run(
    model=None, dataset=None, config_file_list=None, config_dict=None, arguments=None, saved=True, resume=None, callback=None, test=True
) -> dict[str, Any]:
    """Train and test one model.

    Args:
        model, dataset, config_file_list, config_dict, arguments: see :class:`~recbole_mm.config.Config`.
        saved: keep checkpoints; without them the test uses the weights of the last epoch.
        resume: run directory of a run that was interrupted; its settings count, all others must be absent.
        callback: called as ``callback(epoch, validation score)`` after each evaluation.
        test: evaluate on the test part too; a search does so once, for the winner (:func:`test_run`).

    Returns:
        dict with ``best_valid_score``, ``valid_score_bigger``, ``best_valid_result``, ``test_result``, ``run_dir`` and ``record`` (what
        result.json holds).

    Raises:
        UserError: for wrong input of any kind.
    """
    begin = time.perf_counter()
    if resume is not None:
        config = Config(config_dict=read_settings(resume))
        run_dir = Path(resume)
        if distributed.is_main():
            clear_leftovers(run_dir)
    else:
        config = Config(model, dataset, config_file_list, config_dict, arguments)
        run_dir = distributed.on_main(lambda: _new_run(config))
    main = distributed.is_main()
    if main:
        distributed.report("run_dir", str(run_dir))
    else:
        _keep_quiet(config, run_dir)
    given = load_yaml(run_dir / "given.yaml") if (run_dir / "given.yaml").is_file() else {}
    config["run_dir"] = str(run_dir)
    record: dict[str, Any] = {
        "schema": 1,
        "status": "running",
        "error": None,
        **{key: config[key] for key in ("model", "dataset", "encoder", "encoder_training", "feature_set", "seed")},
        "settings": given,
        "processes": distributed.world()[1],
        "versions": versions(),
    }
    finished = resume is not None and _finished(run_dir)  # its record stays unless the run ends well again
    with run_log(run_dir / "run.log" if main else None, config["state"], console=main):
        if not finished:
            write_result(run_dir, record)
        try:
            return _run(config, run_dir, record, begin, saved, resume is not None, callback, test)
        except BaseException as error:
            record["status"] = "failed"
            record["error"] = f"{type(error).__name__}: {error}"
            record["time"] = {"total_s": round(time.perf_counter() - begin, 3)}
            if not finished:
                write_result(run_dir, record)
            logging.getLogger().debug("the run failed", exc_info=True)
            raise


def _finished(run_dir: Path) -> bool:
    try:
        return json.loads((run_dir / "result.json").read_text(encoding="utf-8")).get("status") == "finished"
    except (OSError, ValueError, AttributeError):
        return False


def _new_run(config) -> Path:
    """The directory of a new run, with its settings."""
    run_dir = new_run_dir(config["checkpoint_dir"], config["run_name"], f"{config['model']}-{config['dataset']}")
    write_text(run_dir / "given.yaml", yaml.safe_dump(config.user_settings, sort_keys=False, allow_unicode=True))
    # last: --resume asks for it
    write_text(run_dir / "settings.yaml", yaml.safe_dump(config.settings(), sort_keys=False, allow_unicode=True))
    return run_dir


def _keep_quiet(config, run_dir: Path) -> None:
    """What is different in the processes after the first: they tell nothing."""
    config["show_progress"] = config["log_wandb"] = False
    warnings.simplefilter("ignore")
    if not run_dir.is_dir():
        raise UserError(
            f"This process does not see the run directory {run_dir} that the first one uses. Machines that train together need a common "
            "folder for --checkpoint_dir, and the same data."
        )


def _run(config, run_dir, record, begin, saved, resuming, callback, test) -> dict[str, Any]:
    logger = logging.getLogger()
    logger.info(f"Run directory: {run_dir}")
    dataset, train_data, valid_data, test_data = _prepare(config)
    logger.info(str(dataset))
    if len(set(distributed.gather_values(config["data_fingerprint"]))) > 1:
        raise UserError(
            f"The processes do not see the same data of {config['dataset']}. Give every machine the same files, best one common folder."
        )
    record["encoder"] = config["encoder"]  # a dataset with pictures or texts but no features gets those of classic
    record["data"] = {
        "fingerprint": config["data_fingerprint"],
        "users": dataset.user_num - 1,
        "items": dataset.item_num - 1,
        "interactions": dataset.inter_num,
    }
    model = _build_model(config, train_data)
    logger.info(str(model))
    features = getattr(model, "features", None)
    record["modalities"] = list(features.keys()) if features is not None else []
    record["parameters"] = sum(p.numel() for p in getattr(model, "parameters", tuple)() if p.requires_grad)  # boosted trees have none
    record["protocol"] = {
        "eval_args": config["eval_args"],
        "eval_mask": config["eval_mask"],
        "history_masked": getattr(test_data, "masks_history", None),
        "metrics": config["metrics"],
        "topk": config["topk"],
        "valid_metric": config["valid_metric"],
        "stop_on": config["stop_on"],
    }
    trainer = trainer_class_for(type(model), config)(config, model)
    if resuming:
        last = run_dir / "last.pt"
        if last.is_file() and getattr(trainer, "resumable", False):
            trainer.resume_checkpoint(last)
        else:
            logger.info("Nothing to resume from: starting again from the first epoch.")
    best_score, best_result = trainer.fit(
        train_data, valid_data, saved=saved, show_progress=config["show_progress"], **({"callback_fn": callback} if callback else {})
    )
    test_result = trainer.evaluate(test_data, load_best_model=saved, show_progress=config["show_progress"]) if test else None

    outcome = getattr(trainer, "last_evaluation", None) if test else None
    history = getattr(trainer, "history", [])
    scored = [entry for entry in history if entry.get("valid_score") is not None]
    best = [entry for entry in scored if entry["valid_score"] == best_score]
    record.update(
        status="finished",
        time={
            "total_s": round(time.perf_counter() - begin, 3),
            "epoch_s": [entry["time_s"] for entry in history],
            "evaluation_s": getattr(trainer, "evaluation_times", []),
        },
        memory=peak_memory(),
        epochs=[{key: plain_metrics(value) if key == "valid" and value else value for key, value in entry.items()} for entry in history],
        best_epoch=best[-1]["epoch"] if best else None,
        best_valid_score=float(best_score) if scored else None,
        valid=plain_metrics(best_result),
        **_test_part(run_dir, test_result, outcome),
    )
    extra = getattr(trainer, "extra_results", None)  # what a model's own trainer has to report: groups, texts, phases
    if extra:
        record["extra"] = extra
    write_result(run_dir, record)
    logger.info(f"best valid: {dict2str(record['valid'])}")
    logger.info(f"test result: {dict2str(record['test'])}")
    return {
        "best_valid_score": best_score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": best_result,
        "test_result": test_result,
        "run_dir": str(run_dir),
        "record": record,
    }


def _test_part(run_dir: Path, test_result, outcome) -> dict[str, Any]:
    """What the record says about the test; per-user values go to their file."""
    if distributed.is_main() and outcome is not None and outcome.per_user is not None:
        write_per_user(run_dir, outcome.per_user.arrays())
    groups = {name: plain_metrics(values) for name, values in outcome.groups.items()} if outcome is not None else {}
    return {"test": plain_metrics(test_result), "test_groups": groups}


def test_run(run_dir: str | Path) -> dict[str, Any]:
    """Evaluate the best weights of a finished run on the test part and add that to its result.json; return the record."""
    run_dir = Path(run_dir)
    config, model, _, train_data, _, test_data = load_model(run_dir)
    trainer = trainer_class_for(type(model), config)(config, model)
    trainer.eval_collector.data_collect(train_data)
    result = trainer.evaluate(test_data, load_best_model=False, show_progress=config["show_progress"])
    record = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    record.update(_test_part(run_dir, result, getattr(trainer, "last_evaluation", None)))
    write_result(run_dir, record)
    return record


test_run.__test__ = False  # not a test, although pytest would take it for one by its name


def load_model(run_dir: str | Path) -> LoadedRun:
    """Give back a run: settings, model with the weights of its best epoch (in evaluation mode), dataset and loaders.

    Raises:
        UserError: when the folder is no run, its checkpoint is missing or foreign, or the data have changed.
    """
    run_dir = Path(run_dir)
    config = Config(config_dict=read_settings(run_dir))
    config["run_dir"] = str(run_dir)
    path = run_dir / "best.pt"
    state = checkpoint.load(path, config["device"], needs=("state_dict", "fingerprint"))
    dataset, train_data, valid_data, test_data = _prepare(config)
    if state["fingerprint"] != config["data_fingerprint"]:
        raise UserError(
            f"{run_dir}: the data of {config['dataset']} in {config['data_path']} are not those the run was trained on. Restore them or train again."
        )
    model = _build_model(config, train_data)
    checkpoint.load_weights(model, state, path)
    model.eval()
    return LoadedRun(config, model, dataset, train_data, valid_data, test_data)
