"""VIP5 in words: why an item suits a user."""

from collections.abc import Sequence
from pathlib import Path

import torch

from recbole_mm.errors import UserError, nearest
from recbole_mm.model.vip5.prompts import choose_prompts
from recbole_mm.parsing import parse_options
from recbole_mm.quick_start import LoadedRun, load_model


@torch.no_grad()
def explain(run: LoadedRun | str | Path, pairs: Sequence[tuple[str, str]], prompt: str | None = None) -> list[str]:
    """One sentence for each (user, item) pair, by their names in the dataset's files.

    Args:
        run: a run directory of VIP5, or a loaded run.
        pairs: user and item tokens.
        prompt: id of an explanation prompt; null: the one the run was evaluated with.

    Raises:
        UserError: for an unknown user, item or prompt, a run of another model, or one that was not trained to explain.
    """
    run = run if isinstance(run, LoadedRun) else load_model(run)
    model, dataset = run.model, run.dataset
    if not hasattr(model, "explanation_sample"):
        raise UserError(f"explain needs a run of VIP5; this one is of {run.config['model']}.")
    if "explanation" not in model.tasks or model.records is None:
        raise UserError("This run was not trained to explain: its tasks leave explanation out, or its data have no reviews.")
    if prompt is None:
        chosen = (model.eval_prompts.get("explanation") or model.train_prompts["explanation"])[0]
    else:
        chosen = choose_prompts(model.all_prompts, [prompt])[0]
        if chosen.task != "explanation":
            raise UserError(
                f"Prompt {chosen.id} belongs to the task {chosen.task}; explain needs one of the explanation prompts (C-1 ...)."
            )
    samples = []
    for user, item in pairs:
        ids = []
        for field, token, kind in ((dataset.uid_field, user, "user"), (dataset.iid_field, item, "item")):
            known = dataset.field2token_id[field]
            if str(token) not in known:
                raise UserError(f"Unknown {kind} {str(token)!r}: not in {run.config['dataset']}.{nearest(str(token), known)}")
            ids.append(int(known[str(token)]))
        samples.append(model.explanation_sample(chosen, *ids))
    return model.explain(samples)


def main(arguments: list[str]) -> int:
    """``recbole-mm explain --run=<run directory> --user=<user> --item=<item> [--prompt=C-3]``."""
    options = parse_options(arguments, {"run": "", "user": "", "item": "", "prompt": ""}, "explain", required=("run", "user", "item"))
    print(explain(options["run"], [(str(options["user"]), str(options["item"]))], options["prompt"] or None)[0])
    return 0
