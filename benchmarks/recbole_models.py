"""Which of RecBole's models run today: each one, one epoch on about 10,000 interactions of ml-100k, through our command, 120 seconds at
most.

    python benchmarks/recbole_models.py                    # all; resumable: models with a result are skipped
    python benchmarks/recbole_models.py --models BPR FM    # some
    python benchmarks/recbole_models.py --again            # those that did not pass
    python benchmarks/recbole_models.py --plain            # by RecBole's own run_recbole after `import recbole_mm`, for comparison

The data is the interactions of the first 220 users with the first 300 items in the ml-100k of RecBole's package, so nothing is
downloaded. Entity and relation vectors, which two models read and nobody ships, are random numbers. Results are kept in `--work` (one
JSON and one log per model); the table goes to the console and to `--table`.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import yaml

from recbole_mm.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
DATASET = "ml-100k-10k"
USERS, ITEMS = 220, 300  # the users and items with the smallest numbers: 10,284 interactions
FAMILIES = {
    "general": "general_recommender",
    "sequential": "sequential_recommender",
    "context-aware": "context_aware_recommender",
    "knowledge-aware": "knowledge_aware_recommender",
    "external": "exlib_recommender",
}
INTERACTION = ["user_id", "item_id", "rating", "timestamp"]
SETTINGS = {  # RecBole has settings of these families for the name "ml-100k" only; ours are the same
    "general": {},
    "sequential": {"load_col": {"inter": INTERACTION}, "MAX_ITEM_LIST_LENGTH": 20},
    "context-aware": {
        "threshold": {"rating": 4},
        "load_col": {
            "inter": INTERACTION,
            "user": ["user_id", "age", "gender", "occupation"],
            "item": ["item_id", "release_year", "class"],
        },
    },
    "knowledge-aware": {},
}
SETTINGS["external"] = SETTINGS["context-aware"]
ATTRIBUTES = {"inter": INTERACTION, "item": ["item_id", "release_year", "class"]}
ENTITIES = {
    "inter": INTERACTION,
    "ent": ["ent_id", "ent_emb"],
    "rel": ["rel_id", "rel_emb"],
    "kg": ["head_id", "relation_id", "tail_id"],
    "link": ["item_id", "entity_id"],
}
LAST_OUT = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}  # RecBole gives its sequential models this, but not these two
MODEL_SETTINGS = {
    "NCL": {"num_clusters": 50},  # default 1000, more than there are users here
    **{name: {"load_col": ATTRIBUTES} for name in ("GRU4RecF", "SASRecF", "FDSA", "S3Rec")},
    **{name: {"load_col": {**ATTRIBUTES, "user": ["user_id", "age", "gender", "occupation"]}} for name in ("DIN", "DIEN")},
    "GRU4RecKG": {
        "load_col": {k: ENTITIES[k] for k in ("inter", "ent", "kg", "link")},
        "additional_feat_suffix": ["ent"],
        "eval_args": LAST_OUT,
        "alias_of_entity_id": ["ent_id"],
        "preload_weight": {"ent_id": "ent_emb"},
    },
    "KSR": {
        "load_col": ENTITIES,
        "additional_feat_suffix": ["ent", "rel"],
        "eval_args": LAST_OUT,
        "alias_of_entity_id": ["ent_id"],
        "alias_of_relation_id": ["rel_id"],
        "preload_weight": {"ent_id": "ent_emb", "rel_id": "rel_emb"},
    },
}


def models() -> dict[str, str]:
    """Return every model that RecBole ships: name -> family. Read from its folders, so that none is forgotten."""
    import recbole.model.abstract_recommender as base

    found = {}
    for family, package in FAMILIES.items():
        for file in sorted((Path(base.__file__).parent / package).glob("*.py")):
            for name in re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE):
                if name.lower() == file.stem.lower().replace("_", "") or name.lower() == file.stem.lower():
                    found[name] = family
    return found


def recbole_properties(name: str) -> str:
    """Return the text of RecBole's property file of the model."""
    import recbole

    file = Path(recbole.__file__).parent / "properties" / "model" / f"{name}.yaml"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def make_data(folder: Path) -> None:
    """Write the slice as atomic files below `folder`."""
    import recbole

    source = Path(recbole.__file__).parent / "dataset_example" / "ml-100k"
    target = folder / DATASET
    if (target / "done").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    header, *lines = (source / "ml-100k.inter").read_text().splitlines()
    kept = [line for line in lines if int(line.split("\t")[0]) <= USERS and int(line.split("\t")[1]) <= ITEMS]
    write_text(target / f"{DATASET}.inter", "\n".join([header, *kept]) + "\n")
    for suffix in ("item", "user"):
        write_text(target / f"{DATASET}.{suffix}", (source / f"ml-100k.{suffix}").read_text(encoding="utf-8"))
    header, *lines = (source / "ml-100k.link").read_text().splitlines()
    links = [line for line in lines if int(line.split("\t")[0]) <= ITEMS]
    write_text(target / f"{DATASET}.link", "\n".join([header, *links]) + "\n")
    entities = {line.split("\t")[1] for line in links}
    header, *lines = (source / "ml-100k.kg").read_text().splitlines()
    triples = [line for line in lines if {line.split("\t")[0], line.split("\t")[2]} & entities]
    write_text(target / f"{DATASET}.kg", "\n".join([header, *triples]) + "\n")
    draw = np.random.default_rng(0)
    nodes = sorted(entities | {line.split("\t")[column] for line in triples for column in (0, 2)})
    relations = sorted({line.split("\t")[1] for line in (source / "ml-100k.kg").read_text().splitlines()[1:]})
    for suffix, names in (("ent", nodes), ("rel", relations)):
        rows = [f"{name}\t{' '.join(f'{x:.4f}' for x in draw.normal(scale=0.1, size=64))}" for name in names]
        write_text(target / f"{DATASET}.{suffix}", "\n".join([f"{suffix}_id:token\t{suffix}_emb:float_seq", *rows]) + "\n")
    write_text(target / "done", f"{len(kept)} interactions\n")


PLAIN = """
import json, sys, recbole_mm
from recbole.quick_start import run_recbole
model, dataset, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
del sys.argv[1:]
result = run_recbole(model=model, dataset=dataset, config_dict=settings)
print("TEST " + json.dumps({k: float(v) for k, v in (result["test_result"] or {}).items()}))
"""


STAGES = {  # models that are trained in stages: settings of each, and the setting that takes the file of the stage before
    "S3Rec": ([{"train_stage": "pretrain", "pretrain_epochs": 1, "save_step": 1}, {"train_stage": "finetune"}], "pre_model_path"),
    "RaCT": (
        [{"train_stage": stage, "pretrain_epochs": 1, "save_step": 1} for stage in ("actor_pretrain", "critic_pretrain", "finetune")],
        "pre_model_path",
    ),
    "KD_DAGFM": ([{"phase": phase} for phase in ("teacher_training", "distillation", "finetuning")], "warm_up"),
}


def run(name: str, family: str, work: Path, limit: float, plain: bool) -> dict:
    """Train `name` and return what came of it."""
    checkpoints = work / "checkpoints" / name
    log = work / "log" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    shared = {"data_path": str(work / "data"), "epochs": 1, "show_progress": False, "checkpoint_dir": str(checkpoints), "seed": 2026}
    start, result = time.perf_counter(), {"model": name, "family": family}
    with open(log, "w", encoding="utf-8") as stream:
        stages, takes = STAGES.get(name, ([{}], None))
        for number, stage in enumerate(stages):
            settings = {**shared, **SETTINGS[family], **MODEL_SETTINGS.get(name, {}), **stage}
            if number:
                saved = [path for pattern in ("*.pth", "best.pt") for path in checkpoints.rglob(pattern)]
                settings[takes] = str(max(saved, key=lambda path: path.stat().st_mtime))
            if plain:
                if family == "sequential" and re.search("^loss_type: 'CE'", recbole_properties(name), re.MULTILINE):
                    settings["train_neg_sample_args"] = None  # RecBole wants this said; our Config sees to it
                command = [sys.executable, "-c", PLAIN, name, DATASET, json.dumps(settings)]
            else:
                file = work / "settings" / f"{name}-{number}.yaml"
                write_text(file, yaml.safe_dump(settings, sort_keys=False))
                command = [
                    sys.executable,
                    str(ROOT / "run_recbole_mm.py"),
                    f"--model={name}",
                    f"--dataset={DATASET}",
                    f"--config_files={file}",
                ]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
            try:
                done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, timeout=limit, cwd=work, env=environment)
            except subprocess.TimeoutExpired:
                return {
                    **result,
                    "status": "timed out",
                    "seconds": round(time.perf_counter() - start, 1),
                    "reason": f"more than {limit:g} s",
                }
            if done.returncode:
                break
    text = log.read_text(encoding="utf-8", errors="replace")
    result["seconds"] = round(time.perf_counter() - start, 1)
    if done.returncode:
        lines = [line for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"^[\w.]*(Error|Exception|Interrupt)\b", line)]
        return {**result, "status": "failed", "reason": (errors or lines or ["no output"])[-1][:300]}
    return {**result, "status": "passed", "reason": ""}


def table(results: list[dict]) -> str:
    """Return the results as Markdown, failures first within each family."""
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("recbole", "torch", "numpy", "scipy", "pandas"))
    lines = [
        "# RecBole's models, run by recbole_mm",
        "",
        "One epoch on 10,284 interactions of ml-100k, 120 s limit each, with validation and test, sequences of 20 items;",
        f"Python {platform.python_version()}, {versions}. Made by `python benchmarks/recbole_models.py`.",
        "",
        "| family | models | passed | failed | timed out |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for family in FAMILIES:
        outcomes = [r["status"] for r in results if r["family"] == family]
        lines.append(f"| {family} | {len(outcomes)} | {' | '.join(str(outcomes.count(s)) for s in ('passed', 'failed', 'timed out'))} |")
    lines += ["", "| model | family | result | seconds | reason |", "| --- | --- | --- | ---: | --- |"]
    order = list(FAMILIES)
    for r in sorted(results, key=lambda r: (order.index(r["family"]), r["status"] == "passed", r["model"].lower())):
        reason = r["reason"].replace("|", r"\|")
        lines.append(f"| {r['model']} | {r['family']} | {r['status']} | {r['seconds']:.0f} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="names; default: all")
    parser.add_argument("--work", type=Path, default=ROOT / "saved" / "recbole_models", help="folder for data, logs and results")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each run; models with stages have several")
    parser.add_argument("--again", action="store_true", help="repeat the models that did not pass")
    parser.add_argument("--plain", action="store_true", help="by RecBole's own run_recbole after `import recbole_mm`")
    arguments = parser.parse_args()

    import recbole_mm  # noqa: F401  (lets RecBole be imported)

    work = arguments.work.resolve()
    make_data(work / "data")
    known = models()
    unknown = set(arguments.models or ()) - set(known)
    if unknown:
        parser.error(f"RecBole has no model {', '.join(sorted(unknown))}")
    results = []
    for name, family in known.items():
        file = work / ("plain" if arguments.plain else "results") / f"{name}.json"
        result = json.loads(file.read_text()) if file.exists() else None
        asked = arguments.models is None or name in arguments.models
        if asked and (result is None or arguments.models or (arguments.again and result["status"] != "passed")):
            result = run(name, family, work, arguments.limit, arguments.plain)
            write_json(file, result)
            print(f"{name:15} {result['status']:9} {result['seconds']:6.1f} s  {result['reason']}", flush=True)
        if result is not None:
            results.append(result)
    text = table(results)
    print("\n" + text)
    if arguments.table:
        write_text(arguments.table, text)
    return 0 if all(r["status"] == "passed" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
