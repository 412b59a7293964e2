r"""PerPEFT-SASRec: users are put into groups by their interests, and every group gets its own adapter in one frozen CLIP.

Source: Kim, Hwang, Shin, "Personalized Parameter-Efficient Fine-Tuning of Foundation Models for Multimodal Recommendation", WWW 2026;
official code https://github.com/kswoo97/PerPEFT. Training has three parts: one adapter for all (global PEFT), grouping of the users by
KMeans on their sequence vectors, and one adapter and projector per group, started from the global ones, with one shared SASRec. The loop is in
``trainer/perpeft.py``; the arithmetic in ``network.py`` and ``layer/``.

Differences from the official code, each for the reason given:

* Group negatives are what the group has bought less what the user has. The official sampler compares positions in its list with item ids: 15 % of
  its negatives on toy data are positives of the same user, and it can loop for ever.
* Groups come from training items only (`group_with_valid` gives the published variant, which looks at the validation item), from users
  with a history only, and from a seeded KMeans with several starts; the official code clusters zero rows too.
* Every group is scored on the whole catalogue; the official code cuts it at the largest id that occurs in the group.
* One pass over all users per epoch instead of draws by unseeded worker processes.
* The padding item's feature is a zero vector in training too (official IISAN encodes id 0 then, and does not in evaluation).
* One AdamW with all parameters in place of two with the same numbers, which is the same arithmetic.
"""

import logging
from functools import partial

import numpy as np
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_mm.data.group_sampler import GroupSampler
from recbole_mm.data.sampler import pair_keys
from recbole_mm.data.user_sequence import UserSequenceDataset
from recbole_mm.distributed import Share, broadcast_tensors, sharing
from recbole_mm.encoder.clip import TransformersNetwork
from recbole_mm.encoder.extract import choose_precision
from recbole_mm.errors import UserError
from recbole_mm.model.perpeft.encoder import CLIPItems, FrozenEncoder, IISANEncoder, PeftEncoder, spread_layers
from recbole_mm.model.perpeft.network import GroupedSASRec, left_padded

SCOPES = ("none", "global", "personalized")


class PerPEFTSASRec(SequentialRecommender):
    """Loss over every position of one sequence per user; scores against the item table of the user's own group.

    ``peft_scope`` is the paper's comparison in one setting: none (frozen features), global (one adapter), personalized.
    """

    input_type = InputType.POINTWISE
    supported_paradigms = ("frozen",)
    dataset_class = UserSequenceDataset
    trainer_class = "recbole_mm.trainer.perpeft.PerPEFTTrainer"
    parallel = "own"  # the negatives are drawn for the whole batch, and the mean is one over positions

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        scope = config["peft_scope"]
        if scope not in SCOPES:
            raise UserError(f"peft_scope: expected one of {', '.join(SCOPES)}, got {scope!r}.")
        self.personalized = scope == "personalized"
        self.n_groups = config["n_groups"] if self.personalized else 1
        if not isinstance(self.n_groups, int) or self.n_groups < 1:
            raise UserError(f"n_groups: expected a whole number of at least 1, got {config['n_groups']!r}.")
        self.global_epochs = config["global_epochs"] if self.personalized else 0
        self.group_negatives = config["group_negatives"]
        self.negative_items = config["negative_items"]
        self.group_min_items = config["group_min_items"]
        self.group_with_valid = config["group_with_valid"]
        self.seed = config["seed"]
        self.n_users = dataset.user_num
        self.dataset = dataset

        self.network = GroupedSASRec(
            build_encoder(config, dataset, scope, self.n_groups, self.device),
            self.n_items,
            self.n_groups,
            self.max_seq_length,
            config["hidden_size"],
            config["n_layers"],
            config["n_heads"],
            config["hidden_dropout_prob"],
            config["attn_dropout_prob"],
            weight=config["weight_scalar"],
            l2_emb=config["l2_emb"],
            mask_padding=config["mask_padding"],
        )
        if config["standardise_features"]:
            self.network.standardise()
        self.register_buffer("user_group", torch.zeros(self.n_users, dtype=torch.int64))
        self.register_buffer("grouped", torch.tensor(not self.personalized))
        self.register_buffer("sequences", dataset.user_sequences(self.max_seq_length + 1), persistent=False)
        self.pairs = pair_keys(dataset.inter_feat[dataset.uid_field], dataset.inter_feat[dataset.iid_field], self.n_items)
        self._negatives: GroupSampler | None = None
        self._tables: dict[int, Tensor] = {}
        self._leave_out_frozen_weights(config["pretrained"] is not None)

    def _leave_out_frozen_weights(self, stored_elsewhere: bool) -> None:
        """Keep the base's frozen weights out of checkpoints when they can be loaded again; random ones exist nowhere else."""
        items = getattr(self.network.encoder, "items", None)
        if items is None or not stored_elsewhere:
            return
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]

        def leave_out(module, state, prefix, metadata):
            for name in frozen:
                state.pop(prefix + name, None)

        def put_in(module, state, prefix, *_):
            own = dict(module.named_parameters())
            for name in frozen:
                state.setdefault(prefix + name, own[name].detach())

        self.register_state_dict_post_hook(leave_out)
        self.register_load_state_dict_pre_hook(put_in)

    def other_parameter(self) -> dict:
        return {"clip": self.network.encoder.fingerprint}

    def load_other_parameter(self, para) -> None:
        found = (para or {}).get("clip", self.network.encoder.fingerprint)
        if found != self.network.encoder.fingerprint:
            raise UserError(
                f"The checkpoint belongs to another CLIP (weights {found}, now {self.network.encoder.fingerprint}). "
                "Set pretrained to the weights of that run."
            )
        self._reset()

    # groups

    def group_sequences(self) -> Tensor:
        """What the groups are made from: each user's last items, left padded [n_users, T]."""
        return self.dataset.user_sequences(self.max_seq_length, with_valid=self.group_with_valid).to(self.device)

    @torch.no_grad()
    def user_vectors(self, sequences: Tensor, rows: int = 4096) -> Tensor:
        """Each row's state at its last position [B, D], under the user's present group; evaluation mode."""
        self.eval()
        groups = self.user_group
        parts = torch.arange(len(sequences), device=self.device).split(rows)
        return torch.cat([self.network.user_vectors(sequences[part], groups[part], self._table) for part in parts])

    def assign_groups(self) -> Tensor:
        """Cluster the users and give every group the global adapter and projector; returns the groups [n_users].

        KMeans is fitted on users with at least `group_min_items` training items. Users with fewer go to the nearest centre, users
        without any item to the largest group.
        """
        from sklearn.cluster import KMeans

        sequences = self.group_sequences()
        vectors = self.user_vectors(sequences).cpu().double().numpy()
        count = torch.bincount(self.pairs // self.n_items, minlength=self.n_users).numpy()
        known, fitted = np.flatnonzero(count > 0), np.flatnonzero(count >= self.group_min_items)
        if len(fitted) < self.n_groups:
            raise UserError(
                f"n_groups: {self.n_groups} groups need as many users with at least {self.group_min_items} training items (group_min_items), "
                f"the data has {len(fitted)}. Choose fewer groups."
            )
        means = KMeans(self.n_groups, n_init=10, max_iter=100, random_state=self.seed).fit(vectors[fitted])
        groups = np.full(self.n_users, np.bincount(means.labels_, minlength=self.n_groups).argmax())
        groups[known] = means.predict(vectors[known])
        groups[fitted] = means.labels_
        self.network.copy_group(0, list(range(1, self.n_groups)))
        found = torch.from_numpy(groups)
        broadcast_tensors([found])  # a last digit that differs between processes must not put a user into two groups
        groups = found.numpy()
        self.user_group.copy_(found)
        self.grouped.fill_(True)
        self._reset()
        sizes = np.bincount(groups[known], minlength=self.n_groups)
        logging.getLogger().info(
            f"PerPEFT: {len(known)} users in {self.n_groups} groups of {', '.join(map(str, sorted(sizes, reverse=True)))}"
        )
        return self.user_group

    # training

    def training_users(self) -> Tensor:
        """Users with at least one pair of successive training items."""
        return (self.sequences[:, -2] > 0).nonzero().flatten()

    def parameter_groups(self) -> list[dict]:
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def _reset(self) -> None:
        """Forget what depends on weights or groups."""
        self._tables.clear()
        self._negatives = None

    def train(self, mode: bool = True):
        self._tables.clear()
        return super().train(mode)

    def load_state_dict(self, *args, **kwargs):
        self._reset()
        return super().load_state_dict(*args, **kwargs)

    def sample_negatives(self, users: Tensor, number: int) -> Tensor:
        """`number` negatives for each user, [B, number]: of the user's group, or of the whole catalogue."""
        if self._negatives is None:
            if self.group_negatives and self.n_groups > 1 and bool(self.grouped):
                groups = self.user_group
            else:  # one group for all has what occurs in training as its pool
                groups = torch.zeros_like(self.user_group) if self.negative_items == "train" else None
            tokens = partial(self.dataset.id2token, self.dataset.uid_field)
            self._negatives = GroupSampler(self.pairs, self.n_users, self.n_items, groups, self.device, tokens)
        return self._negatives.sample(users, number)

    def calculate_loss(self, interaction) -> Tensor:
        """Loss over the training sequences of the users in `interaction`, each user once.

        An interaction that brings its own sequence (validation, with `stop_on: loss`) counts at its last position only.
        """
        users, share = interaction[self.USER_ID], None
        if self.ITEM_SEQ in interaction:
            sequence = left_padded(interaction[self.ITEM_SEQ])
            positive = torch.zeros_like(sequence)
            positive[:, -1] = interaction[self.ITEM_ID]
        else:
            users = users.unique()
            share = Share.of(len(users))
            rows = self.sequences[users]
            sequence, positive = rows[:, :-1], rows[:, 1:] * (rows[:, :-1] > 0)
        negative = self.sample_negatives(users, sequence.shape[1]) * (positive > 0)
        if share is None:
            return self.network.loss(sequence, positive, negative, self.user_group[users])
        with sharing(share):
            own = (share.take(column) for column in (sequence, positive, negative, self.user_group[users]))
            return self.network.loss(*own) * share.scale

    # evaluation

    def _table(self, group: int) -> Tensor:
        if self.training:
            return self.network.item_table(group)
        if group not in self._tables:
            self._tables[group] = self.network.item_table(group)
        return self._tables[group]

    def before_evaluation(self) -> None:
        """Encode the catalogue once for every group that has users."""
        for group in self.user_group[1:].unique().tolist():
            if group not in self._tables:
                self._tables[group] = self.network.item_table(group, together=True)

    @torch.no_grad()
    def full_sort_predict(self, interaction) -> Tensor:
        """Scores with every item as the user's group sees it, flattened to [B * I]."""
        groups = self.user_group[interaction[self.USER_ID]]
        users = self.network.user_vectors(left_padded(interaction[self.ITEM_SEQ]), groups, self._table)
        scores = users.new_empty(len(users), self.n_items)
        for group in groups.unique().tolist():
            rows = groups == group
            scores[rows] = users[rows] @ self._table(group).T
        return scores.view(-1)

    def predict(self, interaction) -> Tensor:
        """Scores of the given pairs, [B]."""
        scores = self.full_sort_predict(interaction).view(-1, self.n_items)
        return scores.gather(1, interaction[self.ITEM_ID][:, None]).squeeze(1)


def build_items(config, dataset, device: torch.device) -> CLIPItems:
    """The frozen CLIP of the settings, with the pictures and texts of the data set: decoded and tokenised once."""
    if config["encoder_library"] != "transformers":
        raise UserError(
            f"PerPEFTSASRec puts adapters into a CLIPModel of transformers that it loads itself; got encoder_library: {config['encoder_library']!r}. "
            "Leave encoder at null, and name the CLIP by encoder_model and pretrained."
        )
    content = dataset.content
    if not (content.has_images and content.has_texts):
        lacking = " and ".join(what for what, there in (("pictures", content.has_images), ("texts", content.has_texts)) if not there)
        raise UserError(
            f"PerPEFTSASRec encodes the picture and the text of every item, but {config['dataset']!r} has no {lacking} (looked in "
            f"{config['data_path']}). Pictures belong in {config['image_folder']}/<item token>.jpg, texts in columns of the .item file."
        )
    keys = ("encoder_model", "pretrained", "encoder_sizes", "encoder_image_size")
    network = TransformersNetwork({key: config[key] for key in keys})
    length = min(config["encoder_text_length"] or network.context, network.context)
    tokens = network.tokenizer(["", *content.texts(range(1, dataset.item_num))], context_length=length)
    precision = choose_precision(network, config["encoder_precision"], device)
    items = CLIPItems(
        network,
        lambda ids: torch.as_tensor(content.image_tensor(ids.tolist(), network.transform)),
        tokens,
        torch.bfloat16 if precision == "bf16" else torch.float32,
        config["encoder_chunk"],
    )
    return items.to(device)


def build_encoder(config, dataset, scope: str, n_groups: int, device: torch.device):
    """The item encoder that `scope` and ``peft_kind`` ask for."""
    items = build_items(config, dataset, device)
    every = torch.arange(1, dataset.item_num, device=device)
    if scope == "none":
        with torch.no_grad():
            features = items(every)
        encoder = FrozenEncoder(torch.cat((features.new_zeros(1, features.shape[1]), features)))
    elif config["peft_kind"] == "iisan":
        encoder = IISANEncoder(*hidden_states(items, every, config["iisan_states"]), n_groups, config["iisan_hidden"])
    else:
        encoder = PeftEncoder(items, config["peft_kind"], n_groups, config["peft_target_modules"], peft_arguments(config))
    encoder.fingerprint = items.fingerprint
    return encoder.to(device)


def hidden_states(items: CLIPItems, every: Tensor, n_states: int) -> tuple[Tensor, Tensor]:
    """Cached states of all items with a zero row for padding, image [I, K, V] and text [I, K, T], in half precision."""
    depth = {"visual": items.config.vision_config.num_hidden_layers, "textual": items.config.text_config.num_hidden_layers}
    if not 2 <= n_states <= min(depth.values()) + 1:
        raise UserError(
            f"iisan_states: expected 2 to {min(depth.values()) + 1} for this CLIP (its layers and the embedding), got {n_states}."
        )
    layers = {tower: spread_layers(n, n_states) for tower, n in depth.items()}
    parts = [[state.half() for state in items.hidden_states(part, layers)] for part in every.split(16 * items.chunk)]
    return tuple(nn.functional.pad(torch.cat(states), (0, 0, 0, 0, 1, 0)) for states in zip(*parts))


def peft_arguments(config) -> dict:
    """``peft_arguments``, with the settings that LoRA has names for."""
    given = dict(config["peft_arguments"] or {})
    if config["peft_kind"] == "lora":
        given = {"r": config["peft_rank"], "lora_alpha": config["peft_alpha"], "lora_dropout": config["peft_dropout"], **given}
    return given
