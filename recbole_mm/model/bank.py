"""FeatureBank: the item features a model works with, one matrix per modality, row 0 zero for RecBole's padding item.

Frozen features are data. In end-to-end training (:class:`EncoderBank`) an encoder fills the bank and learns from the recommendation loss;
the models see the same mapping and need no line of their own.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recbole_mm import distributed
from recbole_mm.errors import UserError
from recbole_mm.model.live import LiveTable

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FeatureBank(nn.Module):
    """A read-only mapping modality -> features [n_items, F_m], on the model's device and in the model's canonical order.

    The matrices are buffers that no checkpoint holds (a fingerprint of them stands there instead): they can be gigabytes, and come back
    from the feature files. Models use ``bank[m]``, ``bank.items()``, ``bank.keys()``, ``bank.dims[m]``, ``len(bank)``.
    """

    #: whether an encoder is trained through this bank
    trainable = False

    def __init__(self, features: Mapping[str, Tensor]):
        super().__init__()
        self._names = list(features)
        for name, table in features.items():
            self.register_buffer(self._slot(name), torch.as_tensor(table, dtype=torch.float32), persistent=False)
        self.dims = {name: self._table(name).shape[1] for name in self._names}

    def _slot(self, name: str) -> str:
        return f"table_{self._names.index(name)}"  # a modality may be named by the user with dots, which buffers may not have

    def _table(self, name: str) -> Tensor:
        return getattr(self, self._slot(name))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._table(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def keys(self) -> list[str]:
        return list(self._names)

    def values(self) -> list[Tensor]:
        return [self[name] for name in self._names]

    def items(self) -> list[tuple[str, Tensor]]:
        return [(name, self[name]) for name in self._names]

    def own_groups(self, groups: list) -> list:
        """The optimiser groups of a model with the bank's own parameters taken out and put into groups of their own."""
        return groups

    def apply(self, fn):
        """Leave the bank out of ``model.apply(initialise)``: a model's initialisation must not touch an encoder's weights."""
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(self._table(name).shape)}" for name in self._names)


class EncoderBank(FeatureBank):
    """A bank whose rows come from an encoder that is trained with the recommender.

    Before a batch's loss (:meth:`before_batch`) its items are encoded in micro-batches without a graph and written into the table; the model
    sees them as the only rows that carry gradient. After ``loss.backward()`` (:meth:`after_backward`) the micro-batches are encoded again,
    with the same random draws, and the gradient of their rows goes through the encoder: memory is that of one micro-batch, whatever the
    batch and the catalogue (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021).

    All other rows are the last known values. The whole table is encoded anew every ``bank_refresh_epochs``, and whenever it is read in
    evaluation mode or a checkpoint is taken after the weights have changed; so a checkpoint's weights alone give the bank back. Several
    processes share the micro-batches out and exchange their rows, so all hold the same table; all must come to these points together.

    Args:
        encoder: a trainable encoder; frozen blocks and gradient checkpointing are set up here.
        inputs: gives pictures and token ids of items (:class:`recbole_mm.encoder.inputs.CatalogueInputs`).
        names: modalities in the model's order; those that the encoder does not give are taken from `others`.
        settings: the keys ``bank_refresh_epochs``, ``encoder_micro_batch``, ``encoder_learning_rate``, ``encoder_weight_decay``,
            ``encoder_freeze_blocks``, ``encoder_gradient_checkpointing``, ``missing_modality``, ``amp``.
        fields: names of the batch's columns that hold item ids.
        others: fixed features [n_items, F_m] of further modalities.
    """

    trainable = True

    def __init__(self, encoder, inputs, names: Sequence[str], settings: Mapping, fields: Sequence[str], others: Mapping | None = None):
        rows = len(inputs.content.tokens)
        others = others or {}
        super().__init__({m: others[m] if m in others else torch.zeros(rows, encoder.feature_dims[m]) for m in names})
        self.encoder = encoder
        self.live = [m for m in names if m not in others]
        self.fields = list(fields)
        self.micro_batch = settings["encoder_micro_batch"] or 32
        self.refresh_epochs = settings["bank_refresh_epochs"] or 0
        self.learning_rate = settings["encoder_learning_rate"]
        self.weight_decay = settings["encoder_weight_decay"] or 0.0
        self.missing_modality = settings["missing_modality"] or "mean"
        self.amp = _AMP.get(settings["amp"])
        self._inputs = inputs
        encoder.freeze(settings["encoder_freeze_blocks"] or 0)
        if settings["encoder_gradient_checkpointing"]:
            encoder.set_checkpointing(True)
        self._known = False  # whether the table has been filled since the weights came
        self._changed = False  # whether the weights have changed since then
        self._fresh: dict[str, tuple[Tensor, Tensor]] = {}  # modality -> (item ids, their rows as leaves)
        self._seed = settings["seed"] if "seed" in settings else 0
        self._epoch = self._batch = 0  # what the draws of the micro-batches depend on where processes share them out
        self._draws: list[tuple[Tensor, list[Tensor]]] = []  # micro-batch -> (item ids, state of the generators before it)
        self.register_state_dict_pre_hook(lambda bank, prefix, keep: bank.settle())
        self.register_load_state_dict_post_hook(lambda bank, keys: bank.forget())
        self._check_missing()

    def _check_missing(self) -> None:
        for m in self.live:
            absent = int((~self._inputs.has(m)[1:]).sum())
            total = len(self._inputs.content.tokens) - 1
            if absent == total:
                what = {"visual": "no item has a picture", "textual": "no item has a text"}.get(m, "no item has both a picture and a text")
                raise UserError(
                    f"encoder_training: end2end encodes {m}, but {what}. Check image_folder and text_fields, or set --modalities."
                )
            if absent and self.missing_modality == "error":
                raise UserError(
                    f"{absent} of {total} items have no content for {m}, and missing_modality is error. Set it to mean or zero."
                )
            if absent:
                logging.getLogger().warning(f"{m}: {absent} of {total} items have no content; their rows are {self.missing_modality}.")

    # --- what the table holds ---------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        table = super().__getitem__(name)
        if name not in self.live:
            return table
        if not self._known or (self._changed and not self.training):
            self.encode_all()
        if name in self._fresh and torch.is_grad_enabled():
            return LiveTable(table, *self._fresh[name])
        return table

    def settle(self) -> None:
        """Bring the table up to the weights."""
        if self._changed or not self._known:
            self.encode_all()

    def forget(self) -> None:
        """Other weights were loaded: what the table holds is theirs no longer."""
        self._known = False
        self._drop()

    def _drop(self) -> None:
        self._fresh, self._draws = {}, []

    @torch.no_grad()
    def encode_all(self) -> None:
        """Encode every item in evaluation mode."""
        mode = self.encoder.training
        self.encoder.eval()
        rank, processes = distributed.world()
        parts = torch.arange(1, len(self._inputs.content.tokens)).split(self.micro_batch)
        for begin in range(0, len(parts), processes):  # each process encodes one, and all get all
            own = parts[begin + rank] if begin + rank < len(parts) else parts[0][:0]
            for m, (ids, rows) in self._gathered([self._encode(own)]).items():
                self._table(m)[ids.to(rows.device)] = rows
        self.encoder.train(mode)
        for m in self.live:
            has = self._inputs.has(m)
            if self.missing_modality == "mean" and not has[1:].all():
                table = self._table(m)
                absent = (~has).nonzero().squeeze(1)[1:].to(table.device)  # row 0 is padding and stays zero
                table[absent] = table[has.to(table.device)].mean(dim=0)
        self._known, self._changed = True, False
        self._drop()

    def _gathered(self, parts: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, tuple[Tensor, Tensor]]:
        """The results of several :meth:`_encode`, put together and with those of the other processes, sorted by item."""
        out = {}
        for m in self.live:
            found = [part[m] for part in parts if m in part]
            table = self._table(m)
            ids = torch.cat([ids for ids, _ in found]) if found else torch.zeros(0, dtype=torch.int64)
            rows = torch.cat([rows for _, rows in found]) if found else table[:0]
            if distributed.world()[1] > 1:
                ids, rows = distributed.gather(ids), distributed.gather(rows)
                order = ids.argsort()
                ids, rows = ids[order], rows[order.to(rows.device)]
            if len(ids):
                out[m] = ids, rows
        return out

    def _encode(self, items: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Features of `items` (on the CPU): modality -> (ids that have the content, rows [b, F_m])."""
        out = {}
        device = self._table(self.live[0]).device
        with torch.autocast(device.type, dtype=self.amp, enabled=self.amp is not None):
            if "joint" in self.live:
                both = items[self._inputs.has("joint")[items]]
                if len(both):
                    rows = self.encoder.encode(images=self._inputs.images(both), texts=self._inputs.texts(both))
                    out["joint"] = both, rows["joint"].float()
            for m, key, give in (("visual", "images", self._inputs.images), ("textual", "texts", self._inputs.texts)):
                if m in self.live:
                    own = items[self._inputs.has(m)[items]]
                    if len(own):
                        out[m] = own, self.encoder.encode(**{key: give(own)})[m].float()
        return out

    # --- a training step --------------------------------------------------------------------------------------------------------

    def before_epoch(self, epoch: int) -> None:
        """Encode everything anew every `bank_refresh_epochs` epochs (0: only for evaluations and checkpoints)."""
        self._epoch, self._batch = epoch, 0
        if self.refresh_epochs and epoch % self.refresh_epochs == 0 and self._changed:
            self.encode_all()

    def before_batch(self, interaction) -> None:
        """Encode the batch's items and make their rows carry gradient."""
        columns = [interaction[field].reshape(-1) for field in self.fields if field in interaction]
        if columns:
            self.refresh(torch.cat(columns))

    @torch.no_grad()
    def refresh(self, items: Tensor) -> None:
        """Encode `items` in training mode without a graph, write them into the table, and keep their rows as leaves."""
        if not self._known:
            self.encode_all()
        self._drop()
        items = items.unique().cpu()
        rank, processes = distributed.world()
        before, parts = generator_states(), []
        for number, ids in enumerate(items[items > 0].split(self.micro_batch)):
            if number % processes != rank:
                continue
            if processes > 1:  # nobody draws for the others: each micro-batch has a seed of its own
                torch.manual_seed(int(np.random.SeedSequence([self._seed or 0, self._epoch, self._batch, number]).generate_state(1)[0]))
            self._draws.append((ids, generator_states()))
            parts.append(self._encode(ids))
        if processes > 1:
            set_generator_states(before)
        self._batch += 1
        for m, (ids, rows) in self._gathered(parts).items():
            ids = ids.to(self._table(m).device)
            self._table(m)[ids] = rows
            self._fresh[m] = ids, rows.requires_grad_()

    def after_backward(self) -> None:
        """Send the gradient of the batch's rows through the encoder, one micro-batch at a time."""
        after = generator_states()
        gradients = {m: leaf.grad for m, (_, leaf) in self._fresh.items()}
        if distributed.world()[1] > 1:  # each process's loss has its part of the gradient, each process its micro-batches
            used = distributed.all_sum(torch.tensor([gradients[m] is not None for m in self._fresh], dtype=torch.int64)).tolist()
            for (m, (_, leaf)), count in zip(self._fresh.items(), used):
                if count:
                    gradients[m] = distributed.all_sum(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        for ids, states in self._draws:
            set_generator_states(states)
            rows, own_gradients = [], []
            for m, (own, features) in self._encode(ids).items():
                if gradients[m] is not None and features.requires_grad:
                    rows.append(features)
                    known = self._fresh[m][0]
                    own_gradients.append(gradients[m][torch.searchsorted(known, own.to(known.device))])
            if rows:
                torch.autograd.backward(rows, own_gradients)
        set_generator_states(after)
        self._drop()
        self._changed = True

    def own_groups(self, groups: list) -> list:
        """The model's groups without the encoder, then the encoder's: own learning rate, no decay of biases, norms and positions."""
        from recbole_mm.encoder.trainable import decay_groups

        groups = list(groups)
        groups = [dict(g) for g in groups] if groups and isinstance(groups[0], dict) else [{"params": groups}]
        encoder = {id(p) for p in self.encoder.parameters()}
        groups = [{**g, "params": [p for p in g["params"] if id(p) not in encoder]} for g in groups]
        return [g for g in groups if g["params"]] + decay_groups(self.encoder, self.learning_rate, self.weight_decay)


def generator_states() -> list[Tensor]:
    """States of the global random generators that an encoder's forward pass may draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_generator_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def build_bank(config, dataset, order) -> FeatureBank:
    """The bank of a run: features of the dataset, or in end-to-end training those of the encoder.

    Args:
        config: the run's settings.
        dataset: the training part of the dataset.
        order: function that puts modality names into the model's order.

    Raises:
        UserError: when there are no features, or an end-to-end run cannot be set up.
    """
    if "encoder_training" in config and config["encoder_training"] == "end2end":
        return _encoder_bank(config, dataset, order)
    features = getattr(dataset, "features", None)
    if not features:
        raise UserError(
            f"{config['model']} needs item features, but the dataset {config['dataset']!r} has none (looked in {config['data_path']}). "
            "Put <modality>.npy and item_ids.txt there, or make them from pictures and texts with `recbole-mm extract`."
        )
    return FeatureBank({name: features[name] for name in order(features)})


def _encoder_bank(config, dataset, order) -> EncoderBank:
    from recbole_mm.encoder import build_encoder
    from recbole_mm.encoder.inputs import CatalogueInputs
    from recbole_mm.encoder.trainable import TrainableEncoder

    settings = {k: v for k, v in config.final_config_dict.items() if k.startswith("encoder_") or k in ("pretrained", "feature")}
    encoder = build_encoder(config["encoder"], settings)
    if not isinstance(encoder, TrainableEncoder):
        raise UserError(
            f"encoder_training: end2end needs an encoder with learned weights, and {config['encoder']} has none. Take clip or vlmo."
        )
    wanted = config["modalities"] or list(encoder.modalities)
    others = {}
    for m in wanted:
        if m not in encoder.modalities:
            if m not in dataset.features:
                raise UserError(
                    f"modalities: {config['encoder']} gives {', '.join(encoder.modalities)}, and {config['data_path']} has no {m}.npy."
                )
            others[m] = dataset.features[m]
    encoder.fit(dataset.content)
    encoder.to(config["device"])
    inputs = CatalogueInputs(encoder, dataset.content, config["device"])
    item = config["ITEM_ID_FIELD"]
    fields = [item, f"{config['NEG_PREFIX']}{item}", f"{item}{config['LIST_SUFFIX']}"]
    if config["encoder_learning_rate"] is None:
        raise UserError(
            f"encoder_learning_rate: expected a number above 0 for end2end, got null from properties/encoder/{config['encoder']}.yaml."
        )
    return EncoderBank(encoder, inputs, order(wanted), config, fields, others)
