"""Training and evaluation of VIP5: epochs of mixed tasks, a learning rate per step, and three evaluations in one run."""

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from recbole_mm import distributed
from recbole_mm.errors import UserError
from recbole_mm.evaluator.full_sort import evaluate
from recbole_mm.evaluator.text import share_with_word, text_metrics
from recbole_mm.files import write_text
from recbole_mm.model.vip5.prompts import Prompt, Slots
from recbole_mm.model.vip5.samples import EpochLoader, candidate_lists, explanation_slots, sequential_sample
from recbole_mm.trainer.trainer import Trainer


class _Ranked:
    """Stands in for a model at RecBole's evaluation: gives the lists that a search has found as scores of all items.

    Items that were not found score below those that were. Where a list is too short for the largest k, RecBole would fill it with such
    items, which must never be the right one: that one scores -inf, so a user without a parsable item is a miss.
    """

    def __init__(self, keys: list[tuple], targets: Tensor, items: np.ndarray, n_items: int, key_of):
        self.rows = {key: row for row, key in enumerate(keys)}
        self.items, self.targets, self.n_items, self.key_of = items, targets, n_items, key_of

    def eval(self) -> None: ...

    def full_sort_predict(self, interaction) -> Tensor:
        rows = [self.rows.get(key, -1) for key in self.key_of(interaction)]
        scores = torch.full((len(rows), self.n_items), -1e6)
        for score, row in zip(scores, rows):
            if row >= 0:
                found = self.items[row]
                score[self.targets[row]] = -torch.inf
                places = np.flatnonzero(found)
                score[torch.from_numpy(found[places])] = torch.from_numpy(-places.astype(np.float32))
        return scores.view(-1)


class VIP5Trainer(Trainer):
    """The training loop of RecBole over rendered prompts; RecBole's evaluator for the ranking tasks, text measures for explanations.

    Results are named ``<task>/<metric>``; those of further prompts of a task, evaluated in the final test only, ``<task>[<prompt>]/<metric>``.
    """

    def __init__(self, config, model):
        super().__init__(config, model)
        self.extra_results: dict = {"protocol": self.protocol()}
        self.valid_metric = str(config["valid_metric"]).lower()
        if "/" not in self.valid_metric:  # Config falls back to a plain metric when only `topk` or `metrics` was changed
            self.valid_metric = f"{next(iter(model.eval_prompts))}/{self.valid_metric}"
        task = self.valid_metric.split("/")[0]
        if config["stop_on"] != "loss" and task not in model.eval_prompts:
            raise UserError(f"valid_metric: {config['valid_metric']} belongs to the task {task}, which this run does not evaluate. Tasks: {', '.join(model.eval_prompts)}.")  # fmt: skip
        self._lists: dict[tuple, tuple] = {}

    def protocol(self) -> dict:
        """Which of the possible evaluations this run reports; goes into result.json."""
        config, model = self.config, self.model
        published = model.published
        return {
            "published": published,
            "item_numbers": "appearance" if published else config["item_numbers"],
            "search": "free text, parsed" if published else "existing items (direct: the candidates)",
            "search_scores": None if published else model.search_scores,
            "beams": model.beams,
            "history_may_be_recommended": True,
            "candidates": config["candidates"],
            "candidate_seed": config["candidate_seed"],
            "explanation_split": "random" if published else config["explanation_split"],
            "explanation_tokens": model.max_explanation,
            "loss_weighting": model.loss_weighting,
            "visual_tokens": model.k,
            "fine_tuning": model.fine_tuning,
            "train_prompts": [p.id for prompts in model.train_prompts.values() for p in prompts],
            "eval_prompts": {task: [p.id for p in prompts] for task, prompts in model.eval_prompts.items()},
        }

    # training

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        model = self.model
        loader = EpochLoader(
            model.sequences,
            model.records,
            model.train_prompts,
            model.renderer,
            model.negative_pool,
            model.sampling,
            epoch_idx,
        )
        steps = -(-len(loader) // (self.config["gradient_accumulation"] or 1))
        self._done, self._total = epoch_idx * steps, max(self.epochs * steps, 1)
        return super()._train_epoch(loader, epoch_idx, loss_func, show_progress)

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step: linear warm-up, then ``step_schedule``."""
        warmup = int(self._total * self.config["warmup_ratio"])
        if step < warmup:
            return step / warmup
        if self.config["step_schedule"] == "constant":
            return 1.0
        return max(0.0, (self._total - step) / max(self._total - warmup, 1))

    def _step(self) -> None:
        factor = self.rate_factor(self._done)
        for group, rate in zip(self.optimizer.param_groups, self._base_rates):
            group["lr"] = rate * factor
        self._done += 1
        super()._step()

    # evaluation

    def _metrics(self, eval_data, show_progress: bool):
        """All tasks of the run on the validation or test part: one dict of metrics."""
        test = eval_data.phase == "test"
        result: OrderedDict = OrderedDict()
        for task, prompts in self.model.eval_prompts.items():
            for place, prompt in enumerate(prompts if test else prompts[:1]):
                values = self._explanation(prompt, eval_data) if task == "explanation" else self._ranking(prompt, eval_data)
                label = task if place == 0 else f"{task}[{prompt.id}]"
                result.update({f"{label}/{name}": value for name, value in values.items()})
        return result

    def samples(self, prompt: Prompt, eval_data) -> tuple[list[tuple[Prompt, Slots]], np.ndarray | None]:
        """The questions of a ranking task, one per row of `eval_data`, and the candidate lists of the direct task."""
        model, data = self.model, eval_data._dataset.inter_feat
        users, targets = data[model.USER_ID].numpy(), data[model.ITEM_ID].numpy()
        if prompt.kind == "next":
            rows, lengths = data[model.ITEM_SEQ].numpy(), data[model.ITEM_SEQ_LEN].numpy()
            rng = np.random.default_rng(self.config["candidate_seed"])
            separators = rng.integers(2, size=len(users)) if model.published else np.zeros(len(users), dtype=np.int64)
            return [sequential_sample(prompt, int(u), r[:n], int(s)) for u, r, n, s in zip(users, rows, lengths, separators)], None
        key = (eval_data.phase, "lists")
        if key not in self._lists:
            self._lists[key] = candidate_lists(
                model.sequences, users, targets, model.n_items, self.config["candidates"], self.config["candidate_seed"]
            )
        lists = self._lists[key]
        return [(prompt, Slots(user=int(u), item=int(t), items=row[row > 0])) for u, t, row in zip(users, targets, lists)], lists

    def _ranking(self, prompt: Prompt, eval_data) -> OrderedDict:
        model, data = self.model, eval_data._dataset.inter_feat
        samples, lists = self.samples(prompt, eval_data)
        own = distributed.own_part(len(samples))
        count = min(max(self.config["topk"]), model.n_items - 1)
        restrict = None if lists is None else [row[row > 0] for row in lists[own]]
        items, _ = model.rank(samples[own], count, restrict)

        def key_of(interaction) -> list[tuple]:
            columns = (interaction[name].tolist() for name in (model.USER_ID, model.ITEM_ID, model.ITEM_SEQ_LEN))
            return list(zip(*columns))

        part = data[own]
        stand_in = _Ranked(key_of(part), part[model.ITEM_ID], items, model.n_items, key_of)
        outcome = evaluate(stand_in, eval_data, self.config, self.eval_collector, self.evaluator)
        if prompt.task == self.valid_metric.split("/")[0] or self.last_evaluation is None:
            if prompt is model.eval_prompts[prompt.task][0]:
                self.last_evaluation = outcome
        return outcome.metrics

    def _explanation(self, prompt: Prompt, eval_data) -> dict[str, float]:
        model = self.model
        records = model.records
        rows = records.of(1 if eval_data.phase == "valid" else 2)
        questions = [(prompt, explanation_slots(records, int(row))) for row in rows]
        parts = distributed.gather_values(model.explain(questions[distributed.own_part(len(questions))]))
        texts = [text for part in parts for text in part]
        references = [records.explanation[row] for row in rows]
        if "star_rating" in prompt.target_args:
            texts = [text.partition(" , ")[2] or text for text in texts]
        features = [records.feature[row] for row in rows]
        places = self.config["metric_decimal_place"]
        values = {**text_metrics(texts, references), "feature_word": share_with_word(texts, features)}
        if eval_data.phase == "test" and self._saved and distributed.is_main():
            lines = ["\t".join(("generated", "reference", "feature_word"))]
            lines += ["\t".join(line) for line in zip(texts, references, features)]
            write_text(self.run_dir / f"explanations-{prompt.id}.tsv", "\n".join(lines) + "\n")
        return {name: round(value, places) for name, value in values.items()}

    @torch.no_grad()
    def _validation_loss(self, valid_data) -> float:
        """Mean loss of the evaluation prompts with their right answers."""
        model = self.model
        samples = []
        for task, prompts in model.eval_prompts.items():
            if task == "explanation":
                samples += [(prompts[0], explanation_slots(model.records, int(row))) for row in model.records.of(1)]
                continue
            targets = valid_data._dataset.inter_feat[model.ITEM_ID].tolist()
            for (prompt, slots), target in zip(self.samples(prompts[0], valid_data)[0], targets):
                slots.item = target
                samples.append((prompt, slots))
        model.eval()
        total = rows = 0.0
        for batch in model.validation_batches(samples):
            total += float(model.calculate_loss(batch.to(self.device))) * len(batch)
            rows += len(batch)
        return total / max(rows, 1)
