r"""VIP5 as a RecBole model.

Source: S. Geng et al., "VIP5: Towards Multimodal Foundation Models for Recommendation", Findings of EMNLP 2023; official release
jeykigung/VIP5, commit 35b8a05. Deliberate differences, all taken back by ``published: true`` unless noted:

* items have random numbers; in order of first appearance a user's next item often has the next number, which gives the answer away;
* next-item and candidate answers are searched among existing items (or the candidates), not parsed from free text;
* a sample's loss is its mean token loss; the release divides by the length once more;
* negatives in training exclude the user's training items only, not those of validation and test;
* layer norms and biases are not decayed (the release decays norms);
* a review is for training if its interaction is; the release splits reviews at random;
* a source is built from cached token arrays, batches hold samples of similar length (not taken back: the same samples, less padding);
* one process or correctly averaged gradients (not taken back: the release's processes never exchange gradients).

Shapes: B batch, S source tokens, I items (0 is padding).
"""

import logging
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor
from torch.nn import functional as F

from recbole_mm.errors import UserError
from recbole_mm.model.bank import FeatureBank
from recbole_mm.model.vip5.dataset import COLUMN_OF, VIP5Dataset, factorise, read_facts, read_records
from recbole_mm.model.vip5.network import (
    FINE_TUNING,
    TASKS,
    NetworkSettings,
    VIP5Network,
    log_initialised,
    per_token_loss,
    read_checkpoint,
    settings_of_checkpoint,
    training_loss,
)
from recbole_mm.model.vip5.prompts import SEPARATORS, Prompt, Renderer, Slots, choose_prompts, held_out, load_prompts
from recbole_mm.model.vip5.samples import (
    PromptBatch,
    Records,
    SamplingSettings,
    by_length,
    explanation_slots,
    make_batch,
    render,
    sequential_sample,
)
from recbole_mm.model.vip5.search import NORMALISE, Trie, beam_search, score_items
from recbole_mm.model.vip5.start import start_matching, start_numbers
from recbole_mm.model.vip5.tokenizer import Pieces, load_tokenizer, train_tokenizer

#: prompts the paper evaluates with, in its order
EVALUATED = {"sequential": ("A-3", "A-9"), "direct": ("B-5", "B-8"), "explanation": ("C-3", "C-12")}
TEXT_METRICS = ("bleu4", "rouge1", "rouge2", "rougel", "feature_word")


class VIP5(SequentialRecommender):
    """Three families of tasks in one text-to-text network; see the module."""

    input_type = InputType.POINTWISE
    supported_paradigms = ("frozen", "finetuned")
    uses_features = True
    dataset_class = VIP5Dataset
    trainer_class = "recbole_mm.trainer.vip5.VIP5Trainer"
    parallel = "rows"

    @classmethod
    def valid_metrics(cls, settings) -> set[str]:
        """What ``valid_metric`` may be: ``<task>/<metric>@<k>``, or ``explanation/<text metric>``."""
        ranking = {f"{task}/{str(m).lower()}@{k}" for task in TASKS[:2] for m in settings["metrics"] for k in settings["topk"]}
        return ranking | {f"explanation/{name}" for name in TEXT_METRICS}

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.n_users, self.seed, self.published = dataset.user_num, config["seed"], bool(config["published"])
        self.batch_size = config["eval_batch_size"]
        self._check(config)
        state, file_config = read_checkpoint(config["language_model"]) if config["language_model"] else (None, {})
        self.scratch = state is None
        own_tokenizer = not (config["tokenizer"] or config["language_model"])
        self.facts = read_facts(config, dataset, offset_users=own_tokenizer and config["number_tokens"] == "whole")
        self.records, from_reviews = read_records(config, dataset)
        self.sequences = dataset.whole_sequences

        features = dict(dataset.features or {})
        visual = config["visual_modality"]
        self.k = config["visual_tokens"]
        if self.k is None:
            self.k = 2 if visual in features else 0
        if self.k and visual not in features:
            raise UserError(
                f"visual_tokens: {self.k} need item features called {visual!r}, but {config['dataset']} has {', '.join(features) or 'none'}. "
                "Make them with `recbole-mm extract`, name another one in visual_modality, or set visual_tokens: 0."
            )
        self.features = FeatureBank({visual: features[visual]} if self.k else {})

        fields = {argument: argument in from_reviews for argument in ("explanation", "feature", "review_headline", "star_rating")}
        fields |= {"user_desc": self.facts.user_names is not None, "item_title": self.facts.titles is not None}
        self.all_prompts = load_prompts(config["prompt_file"])
        self.fields, self.config_fields = fields, {a: config[c] for a, c in COLUMN_OF.items()}
        self.dataset_name = config["dataset"]
        self.tasks = self._choose_tasks(config["tasks"])
        self.train_prompts = self._choose_training(config["train_prompts"])
        self.eval_prompts = self._choose_evaluation(config["eval_prompts"])

        self.pieces = self._tokenizer(config, own_tokenizer)
        self.renderer = Renderer(self.facts, self.pieces, self.k, config["max_text_length"], config["gen_max_length"])
        mode = config["fine_tuning"] or ("full" if self.scratch else "self_and_cross_attn")
        settings = NetworkSettings.from_mapping({**config["network"], **file_config, "vocab_size": self.pieces.size})
        settings = NetworkSettings(
            **{
                **vars(settings),
                "n_vis_tokens": self.k,
                "feat_dim": self.features.dims[visual] if self.k else 1,
                "dropout_rate": config["dropout"],
                "use_adapter": mode != "full",
                "add_adapter_cross_attn": mode == "self_and_cross_attn",
                "use_single_adapter": config["single_adapter"],
                "reduction_factor": config["reduction_factor"],
            }
        )
        if state is not None:
            read = settings_of_checkpoint(state, settings)
            sizes = "d_model d_ff num_heads d_kv num_layers num_decoder_layers relative_attention_num_buckets max_categories".split()
            gate = {} if "feed_forward_proj" in file_config else {"feed_forward_proj": read.feed_forward_proj}
            settings = NetworkSettings(**{**vars(settings), **{name: getattr(read, name) for name in sizes}, **gate})
        self.network = VIP5Network(settings)
        if state is not None:
            log_initialised(self.network.load_official(state))
        if self.device.type == "cpu":  # T5's learned biases make the fused kernels fall back to a slower path
            self.network.set_attn_implementation("eager")
        self.network.choose_fine_tuning(everything=mode == "full")
        self.fine_tuning = mode
        self.loss_weighting = "published" if self.published else config["loss_weighting"]
        self.beams = config["beams"]
        self.search_scores = config["search_scores"]
        self.max_explanation = 20 if self.published else config["gen_max_length"]
        train_items = np.unique(dataset.inter_feat[self.ITEM_ID].cpu().numpy())
        whole = self.scratch and own_tokenizer and config["number_tokens"] == "whole"
        start = next((key for key in ("matching_start", "collaborative_start") if config[key]), None)
        if start and self.scratch:
            if not whole:
                raise UserError(f"{start} sets the embeddings of users' and items' numbers, so it needs number_tokens: whole and no tokenizer of your own. Set {start}: 0 otherwise.")  # fmt: skip
            self._start(dataset, config)
        # What the search never has to choose between is no negative of the softmax either: words, users, and items that training lacks,
        # of which nothing can be learned but that they are wrong. Only possible where a number is one piece of the model's own vocabulary.
        every = np.arange(1, self.n_items)
        known = train_items if config["negative_items"] == "train" else every
        restricted = whole and not self.published and config["search_scores"] == "trie"
        if config["choice_softmax"] == "list" and self.scratch and not (restricted or self.published):
            raise UserError("choice_softmax: list needs a tokenizer trained on the dataset, number_tokens: whole and search_scores: trie. Set choice_softmax: items otherwise.")  # fmt: skip
        # without pictures nothing tells shuffled items apart; the release shuffles nothing
        shuffled = config["shuffled_numbers"] if self.k and not self.published else 0.0
        answers = torch.zeros(2, self.pieces.size, dtype=torch.bool)  # of the sequential and the direct task; empty: no restriction
        if restricted:
            answers[:, self._number_tokens(self.facts.item_number, known)] = True
            if shuffled:
                answers[1, self._number_tokens(self.facts.item_number, every)] = True
        self.among_listed = config["choice_softmax"] == "list" and restricted
        self.register_buffer("answers", answers, persistent=False)
        self.negative_pool = train_items if config["negative_items"] == "train" else np.arange(1, self.n_items)
        self.sampling = SamplingSettings(
            sequential=config["sequential_samples"],
            sequential_targets=config["sequential_targets"],
            direct=config["direct_samples"],
            explanation=config["explanation_samples"],
            candidates=config["train_candidates"] or config["candidates"],
            shuffled_numbers=shuffled,
            n_items=self.n_items,
            published=self.published,
            max_history=self.max_seq_length,
            batch_size=config["train_batch_size"],
            workers=config["worker"] or 0,
            seed=config["seed"],
        )

    # settings

    @staticmethod
    def _check(config) -> None:
        for key, allowed in (
            ("fine_tuning", (None, *FINE_TUNING)),
            ("item_numbers", ("random", "appearance")),
            ("number_tokens", ("whole", "digits")),
            ("loss_weighting", ("sample", "token", "published")),
            ("search_scores", NORMALISE),
            ("explanation_split", ("leave_one_out", "random")),
            ("choice_softmax", ("items", "list")),
        ):
            if config[key] not in allowed:
                raise UserError(f"{key}: expected one of {', '.join(map(str, allowed))}, got {config[key]!r}.")
        if not isinstance(config["matching_start"], int) or config["matching_start"] < 0:
            raise UserError(f"matching_start: expected a whole number of at least 0, got {config['matching_start']!r}.")
        if not isinstance(config["shuffled_numbers"], (int, float)) or not 0 <= config["shuffled_numbers"] <= 1:
            raise UserError(f"shuffled_numbers: expected a share from 0 to 1, got {config['shuffled_numbers']!r}.")
        if max(config["topk"]) > config["beams"]:
            raise UserError(
                f"topk: {max(config['topk'])} places cannot be filled by a search with {config['beams']} beams. Raise beams or lower topk."
            )
        if config["fine_tuning"] in FINE_TUNING[:2] and not config["language_model"]:
            raise UserError(
                f"fine_tuning: {config['fine_tuning']} leaves the language model as it is, so it needs one: name a T5, P5 or VIP5 checkpoint in "
                "language_model, or set fine_tuning: full to train a small model from scratch."
            )
        if config["visual_tokens"] is not None and (not isinstance(config["visual_tokens"], int) or config["visual_tokens"] < 0):
            raise UserError(f"visual_tokens: expected a whole number of at least 0, got {config['visual_tokens']!r}.")
        if not isinstance(config["network"], dict) or set(config["network"]) - set(NetworkSettings.__dataclass_fields__):
            raise UserError(f"network: expected a mapping of T5 sizes (d_model, d_ff, d_kv, num_heads, num_layers ...), got {config['network']!r}.")  # fmt: skip

    def require(self, prompt: Prompt) -> None:
        """Check that the dataset can fill a prompt.

        Raises:
            UserError: names the field that is missing.
        """
        missing = self.missing(prompt)
        if missing:
            name = missing[0]
            suffix = {"user_desc": ".user", "item_title": ".item"}.get(name, ".inter")
            raise UserError(
                f"Prompt {prompt.id} needs {name}, which {self.dataset_name} cannot give: {self.dataset_name}{suffix} has no column "
                f"{self.config_fields[name]!r} (setting {COLUMN_OF[name]})."
            )

    def missing(self, prompt: Prompt) -> list[str]:
        """Arguments of a prompt for which the dataset has no field."""
        return [name for name in (*prompt.source_args, *prompt.target_args) if not self.fields.get(name, True)]

    def _choose_tasks(self, tasks) -> tuple[str, ...]:
        possible = tuple(t for t in TASKS if any(p.task == t and not self.missing(p) for p in self.all_prompts.values()))
        if tasks is None:
            return possible
        tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        for task in tasks:
            if task not in TASKS:
                raise UserError(f"tasks: expected some of {', '.join(TASKS)}, got {task!r}.")
            if task not in possible:
                self.require(next(p for p in self.all_prompts.values() if p.task == task))
        return tuple(t for t in TASKS if t in tasks)

    def _choose_training(self, ids) -> dict[str, list[Prompt]]:
        if ids is None:
            kept = held_out(self.all_prompts)
            chosen = [p for p in self.all_prompts.values() if p.id not in kept and p.task in self.tasks]
            left_out = [p.id for p in chosen if self.missing(p)]
            if left_out:
                logging.getLogger().warning(f"Prompts that the data cannot fill are not trained: {', '.join(left_out)}")
            chosen = [p for p in chosen if not self.missing(p)]
        else:
            chosen = choose_prompts(self.all_prompts, [ids] if isinstance(ids, str) else ids)
            for prompt in chosen:
                self.require(prompt)
        groups = {task: [p for p in chosen if p.task == task] for task in self.tasks}
        empty = [task for task, prompts in groups.items() if not prompts]
        if empty:
            raise UserError(f"train_prompts: there is no prompt for the task {empty[0]}. Add one or leave the task out of tasks.")
        return groups

    def _choose_evaluation(self, ids) -> dict[str, list[Prompt]]:
        if ids is None:
            chosen = []
            for task in self.tasks:
                every = [*EVALUATED[task], *self.all_prompts]
                fits = (self.all_prompts[n] for n in every if n in self.all_prompts)
                usable = [p for p in fits if p.task == task and p.kind != "yes_no" and not self.missing(p)]
                chosen += usable[:1]
        else:
            chosen = choose_prompts(self.all_prompts, [ids] if isinstance(ids, str) else ids)
            for prompt in chosen:
                self.require(prompt)
                if prompt.kind == "yes_no":
                    raise UserError(
                        f"eval_prompts: {prompt.id} is answered by yes or no, which ranks nothing. Choose one that names an item."
                    )
        return {task: [p for p in chosen if p.task == task] for task in TASKS if any(p.task == task for p in chosen)}

    def _tokenizer(self, config, train: bool) -> Pieces:
        if not train:
            return load_tokenizer(config["tokenizer"] or config["language_model"])
        texts = [f"{p.source} {p.target}".replace("{}", " ") for p in self.all_prompts.values()] * 2 + ["yes no"] * 2
        texts += [" ".join(SEPARATORS)] * 50  # no prompt holds them, but every list does: without this "->" is three pieces, one unknown
        texts += [title for title in self.facts.titles or () if title] + list(self.facts.user_names or ())
        if self.records is not None:
            rows = self.records.of(0)
            texts += [values[i] for values in (self.records.explanation, self.records.feature, self.records.headline) for i in rows]
        numbers = [str(n) for n in (*self.facts.item_number[1:], *self.facts.user_number[1:])]
        return train_tokenizer(texts, numbers, config["vocabulary"], config["number_tokens"] == "whole")

    def _number_tokens(self, numbers: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Piece ids of the numbers of users or items `ids`, where every number is one piece."""
        return np.array([self.renderer.pieces.ids(str(numbers[i]))[0] for i in ids], dtype=np.int64)

    @torch.no_grad()
    def _start(self, dataset, config) -> None:
        """Start from a factorisation of the training interactions; see `start`.

        A user's vector holds the very item that a training sample asks for. With few interactions per user the network learns to read the
        answer there, which does not help later; without ``collaborative_users`` users' numbers start at zero.
        """
        users, items = (dataset.inter_feat[name].cpu().numpy() for name in (self.USER_ID, self.ITEM_ID))
        rank = config["matching_start"] or min(config["collaborative_start"], self.network.settings.d_model)
        vectors = factorise(users, items, self.n_users, self.n_items, rank, self.seed)
        tokens = tuple(self._number_tokens(n, np.arange(1, len(n))) for n in (self.facts.user_number, self.facts.item_number))
        if config["matching_start"]:
            start_matching(self.network, vectors, tokens, next(iter(self.features.values())) if self.k else None, self.seed)
        else:
            start_numbers(self.network, vectors, tokens, self.seed)
        if not config["collaborative_users"]:
            self.network.shared.weight[tokens[0]] = 0.0

    # training

    def parameter_groups(self) -> list[dict]:
        """AdamW's groups: no decay for biases and, unless published, for norms."""
        decayed, others = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                plain = name.endswith("bias") or ("norm" in name and not self.published)
                (others if plain else decayed).append(parameter)
        return [{"params": decayed, "eps": 1e-6}, {"params": others, "eps": 1e-6, "weight_decay": 0.0}]

    def calculate_loss(self, batch: PromptBatch) -> Tensor:
        """Loss of a rendered batch; a scalar."""
        encoded, mask = self.encode(batch)
        hidden, labels = self.network.decode(encoded, mask, batch.labels), batch.labels
        if not (self.training and bool(self.answers.any())):
            return training_loss(per_token_loss(self.network.head(hidden), labels), labels, self.loss_weighting)
        losses = torch.zeros(labels.shape, device=labels.device)
        others = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        for task, allowed in enumerate(self.answers):
            rows = ((batch.tasks == task) & allowed[labels[:, 0]]).nonzero()[:, 0]  # yes and no are words
            others[rows] = False
            # only the rows of the output layer that can be the answer; after a number the end mark is certain, so it costs nothing
            tokens = allowed.nonzero()[:, 0]
            logits = self.network.head(hidden[rows, 0], tokens).float()
            if self.among_listed and task == TASKS.index("direct"):
                listed = torch.zeros(len(rows), len(allowed), dtype=torch.bool, device=labels.device)
                listed.scatter_(1, batch.input_ids[rows], True)
                listed.scatter_(1, labels[rows, :1], True)  # a list may have been cut off
                logits = logits.masked_fill(~listed[:, tokens], -torch.inf)
            losses[rows, 0] = F.cross_entropy(logits, torch.searchsorted(tokens, labels[rows, 0]), reduction="none")
        losses[others] = per_token_loss(self.network.head(hidden[others]), labels[others])
        return training_loss(losses, batch.labels, self.loss_weighting)

    def encode(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Encoder states [B, S, D] and mask [B, S] of a batch on the model's device."""
        visual = None
        if self.k:
            table = next(iter(self.features.values()))
            visual = self.network.visual_tokens(table[batch.items])
        mask = (batch.input_ids != 0).long()
        self.network.set_tasks(batch.tasks)
        embeds = self.network.embed(batch.input_ids, batch.whole_word_ids, visual, batch.visual_index)
        return self.network.encode(embeds, mask), mask

    # generation

    @cached_property
    def trie(self) -> Trie:
        """Token sequences of all items, on the model's device."""
        items = range(1, self.n_items)
        words = [np.append(self.renderer.pieces.ids(str(self.facts.item_number[i])), self.network.settings.eos_token_id) for i in items]
        return Trie(list(items), words).to(self.device)

    def _answers(self, samples: Sequence[tuple[Prompt, Slots]], answer) -> list:
        """`answer(encoded, mask, rows)` for batches of similar length, put back into the order of the samples."""
        rows = [self.renderer.source(prompt, slots) for prompt, slots in samples]
        out: list = [None] * len(rows)
        for chosen in by_length(rows, self.batch_size):
            batch = make_batch([rows[i] for i in chosen], None, [TASKS.index(samples[i][0].task) for i in chosen], self.k)
            with torch.no_grad():
                encoded, mask = self.encode(batch.to(self.device))
                for i, value in zip(chosen, answer(encoded, mask, chosen)):
                    out[i] = value
        return out

    def rank(
        self, samples: Sequence[tuple[Prompt, Slots]], count: int, restrict: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best items for each sample by beam search.

        Args:
            samples: next-item or candidate prompts.
            count: items wanted, at most the number of beams.
            restrict: the items that may be answered, per sample; None for all items.

        Returns:
            items [N, count], 0 where there are no more, and scores.
        """
        if not samples:
            return np.zeros((0, count), dtype=np.int64), np.zeros((0, count), dtype=np.float32)
        self.eval()
        if self.published:
            return self._rank_published(samples, count)

        def answer(encoded, mask, rows):
            candidates = None
            if restrict is not None:
                width = max(len(restrict[i]) for i in rows)
                table = np.zeros((len(rows), width), dtype=np.int64)
                for line, i in zip(table, rows):
                    line[: len(restrict[i])] = restrict[i]
                candidates = torch.from_numpy(table).to(self.device)
            items, scores = beam_search(self.network, encoded, mask, self.trie, self.beams, count, candidates, self.search_scores)
            return zip(items.cpu().numpy(), scores.cpu().numpy())

        found = self._answers(samples, answer)
        return np.stack([items for items, _ in found]), np.stack([scores for _, scores in found])

    def _rank_published(self, samples, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The release's way: free beam search, numbers parsed from the text; of a number written twice the later rank counts."""
        item_of = {int(n): i for i, n in enumerate(self.facts.item_number) if i}

        def answer(encoded, mask, rows):
            out = self.network.generate(
                encoder_outputs=self.network.encoder_outputs(encoded),
                attention_mask=mask,
                past_key_values=self.network.new_cache(),
                num_beams=self.beams,
                num_return_sequences=self.beams,
                max_length=50,
                early_stopping=True,
                do_sample=False,
            )
            for lines in out.view(len(rows), self.beams, -1).tolist():
                rank: dict[int, int] = {}
                for place, line in enumerate(lines):
                    text = self.pieces.text(line[1:])
                    if text.isdecimal():
                        rank[int(text)] = place
                kept = sorted(rank, key=rank.__getitem__)[:count]  # numbers of no item keep their place in the list and hit nothing
                items = np.zeros(count, dtype=np.int64)
                items[: len(kept)] = [item_of.get(n, 0) for n in kept]
                yield items, np.where(items > 0, -np.arange(count), -np.inf)

        found = self._answers(samples, answer)
        return np.stack([items for items, _ in found]), np.stack([scores for _, scores in found]).astype(np.float32)

    def explain(self, samples: Sequence[tuple[Prompt, Slots]]) -> list[str]:
        """Greedy answers to explanation prompts."""
        self.eval()

        def answer(encoded, mask, rows):
            out = self.network.generate(
                encoder_outputs=self.network.encoder_outputs(encoded),
                attention_mask=mask,
                past_key_values=self.network.new_cache(),
                max_length=self.max_explanation,
                num_beams=1,
                do_sample=False,
            )
            return [self.pieces.text(line[1:]) for line in out.tolist()]

        return self._answers(samples, answer)

    def explanation_sample(self, prompt: Prompt, user: int, item: int) -> tuple[Prompt, Slots]:
        """The question why `item` suits `user`. Headline, rating and feature word come from the pair's own review, else from the user's latest."""
        self.require(prompt)
        records: Records = self.records
        same = np.flatnonzero((records.user == user) & (records.item == item))
        own = np.flatnonzero((records.user == user) & (records.part == 0))
        if len(same):
            return prompt, explanation_slots(records, int(same[0]))
        slots = explanation_slots(records, int(own[-1])) if len(own) else Slots(stars="5", feature="", headline="")
        slots.user, slots.item, slots.explanation = user, item, ""
        return prompt, slots

    # RecBole's side

    def _samples(self, interaction) -> list[tuple[Prompt, Slots]]:
        if "sequential" not in self.eval_prompts:
            raise UserError(
                "VIP5 predicts next items by a sequential prompt: add sequential to tasks, or one of its prompts to eval_prompts."
            )
        prompt = self.eval_prompts["sequential"][0]
        users, items = interaction[self.USER_ID].tolist(), interaction[self.ITEM_SEQ].cpu().numpy()
        lengths = interaction[self.ITEM_SEQ_LEN].tolist()
        return [sequential_sample(prompt, u, row[:n]) for u, row, n in zip(users, items, lengths)]

    def full_sort_predict(self, interaction) -> Tensor:
        """Scores of all items, flattened to [B * I]: log-probability of those the search found, -inf for all others."""
        items, values = self.rank(self._samples(interaction), min(self.beams, self.n_items - 1))
        scores = torch.full((len(items), self.n_items), -torch.inf, device=self.device)
        scores.scatter_(1, torch.from_numpy(items).to(self.device), torch.from_numpy(values).to(self.device))
        scores[:, 0] = -torch.inf
        return scores.view(-1)

    def predict(self, interaction) -> Tensor:
        """Log-probability of the given items after the given histories, [B]."""
        samples = self._samples(interaction)
        wanted = interaction[self.ITEM_ID]

        def answer(encoded, mask, rows):
            items = wanted[torch.as_tensor(rows, device=wanted.device)][:, None]
            return score_items(self.network, encoded, mask, self.trie, items, self.search_scores)[:, 0]

        return torch.stack(self._answers(samples, answer))

    def recommend(self, run, users: Sequence[int], topk: int, exclude_history: bool) -> list[list[tuple[int, float]]]:
        """For ``recbole-mm recommend``: the next items after everything known of each user."""
        if topk > self.beams:
            raise UserError(f"topk: {topk} places cannot be filled by a search with {self.beams} beams. Train with a larger `beams`.")
        if "sequential" not in self.eval_prompts:
            raise UserError("This run was not trained to name next items: its tasks leave sequential out.")
        prompt = self.eval_prompts["sequential"][0]
        known = [self.sequences.of(user) for user in users]
        samples = [sequential_sample(prompt, user, items[-self.max_seq_length :]) for user, items in zip(users, known)]
        every = np.arange(1, self.n_items)
        restrict = [np.setdiff1d(every, items) for items in known] if exclude_history else None
        items, scores = self.rank(samples, topk, restrict)
        return [[(int(i), float(s)) for i, s in zip(*row) if i] for row in zip(items, scores)]

    def validation_batches(self, samples: Sequence[tuple[Prompt, Slots]]):
        """Batches with targets, for the loss on held-out samples."""
        rows = [self.renderer.source(prompt, slots) for prompt, slots in samples]
        for chosen in by_length(rows, self.sampling.batch_size):
            yield render(self.renderer, [samples[i] for i in chosen])

    def other_parameter(self):
        """The tokenizer travels with the weights, as text."""
        return {"tokenizer": self.pieces.tokenizer.to_str()}

    def load_other_parameter(self, para):
        """A tokenizer of other pieces would make the weights meaningless."""
        if para and para["tokenizer"] != self.pieces.tokenizer.to_str():
            raise UserError(
                "The tokenizer made from the data is not the one this checkpoint was trained with: the texts of the dataset or the version of "
                "the package tokenizers have changed. Restore them or train again."
            )
