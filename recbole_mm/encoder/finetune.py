r"""recbole-mm finetune: train an encoder on a dataset's own item pictures and texts, then encode the catalogue with it.

Losses: CLIP its contrastive loss (Radford et al., ICML 2021); VLMo contrast, matching with hard negatives and masked words (Bao et al.,
NeurIPS 2022, see vlmo_losses.py). The contrast runs over `finetune_batch_size` pairs although only `finetune_micro_batch` are encoded at
once: features are computed without a graph, the loss gives the gradient of each feature, and the micro-batches are encoded again to send
it through the network (Gao et al., RepL4NLP 2021). Matching and masked words need no other pairs than their own micro-batch's.

Some items are kept for validation; training stops when their loss no longer falls, and the best weights are kept. Every epoch leaves a
checkpoint; ``--resume=<folder>`` goes on where a killed run stopped.

Several processes (``--nproc``, torchrun) share out the pairs of every micro-batch: each encodes its own, all compute the contrast over the
whole batch, and each sends the gradient of its features back. What is drawn (order, crops, blanked words, negatives, masks) is drawn by all
alike, so the step is that of one process.

Usage: recbole-mm finetune --dataset=shop --encoder=tiny-clip [--finetune_epochs=30 ...] [--feature_set=name] [--output=folder]
       recbole-mm finetune --resume=<folder>
"""

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm import checkpoint, distributed
from recbole_mm.config import Config
from recbole_mm.data.content import ItemContent
from recbole_mm.encoder import build_encoder
from recbole_mm.encoder import vlmo_losses as vlmo
from recbole_mm.encoder.extract import encoder_settings, extract
from recbole_mm.encoder.inputs import CatalogueInputs
from recbole_mm.encoder.trainable import TrainableEncoder, decay_groups
from recbole_mm.errors import UserError
from recbole_mm.files import clear_leftovers, write_json
from recbole_mm.memory import keep_freed_memory
from recbole_mm.parsing import load_yaml, parse_arguments

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST_SCALE = 4.6052  # ln 100: CLIP clips its scale there, VLMo does not
RUN_FILE, LAST_FILE, WEIGHTS = "finetune.json", "last.pt", "encoder"


def main(arguments: Sequence[str]) -> int:
    """Fine-tune an encoder on a dataset's item pictures and texts, then encode the catalogue into a new feature set.

    recbole-mm finetune --dataset=shop --encoder=tiny-clip [--finetune_epochs=30] [--feature_set=NAME] [--output=FOLDER] [--nproc=N]
    recbole-mm finetune --resume=FOLDER

    All keys finetune_* are explained in properties/encoder/<encoder>.yaml. The folder (default <checkpoint_dir>/finetune-<encoder>-<dataset>)
    gets the weights under encoder/, which --pretrained=<folder>/encoder loads, and a checkpoint of every epoch.
    """
    given = parse_arguments(list(arguments))
    output, resume = given.pop("output", None), given.pop("resume", None)
    files = given.pop("config_files", None)
    if resume:
        if given or output:
            raise UserError(f"--resume continues with its own settings; remove --{next(iter(given), 'output')}.")
        folder = Path(str(resume))
        given = checkpoint.load(folder / LAST_FILE)["given"]
    else:
        for file in files.replace(",", " ").split() if isinstance(files, str) else files or []:
            given = {**load_yaml(file), **given}
        for key in ("dataset", "encoder"):
            if not given.get(key):
                raise UserError(f"finetune: expected --{key}, e.g. recbole-mm finetune --dataset=shop --encoder=tiny-clip.")
        folder = None
    config = Config("BPR", config_dict=given)
    if folder is None:
        folder = Path(output or Path(config["checkpoint_dir"]) / f"finetune-{config['encoder']}-{config['dataset']}")
    if distributed.is_main():
        distributed.report("run_dir", str(folder))
    tuner = Finetuner(config, folder, given)
    if resume:
        tuner.resume()
    tuner.fit()
    weights = tuner.finish()
    name = given.get("feature_set") or f"{config['encoder']}-finetuned"
    settings = {**given, "pretrained": str(weights), "feature_set": name, "encoder_training": "finetuned"}
    made = extract(Config("BPR", config_dict=settings), overwrite=True)
    if distributed.is_main():
        print(f"Weights in {weights}, feature set in {made}; use them with --encoder={config['encoder']} --feature_set={name}")
    return 0


class Finetuner:
    """One fine-tuning run.

    Args:
        config: names dataset and encoder; reads the keys ``finetune_*``, ``seed`` and ``device``.
        folder: where checkpoints, record and weights go.
        given: the user's settings, kept for a resume.
    """

    def __init__(self, config, folder: Path, given: dict | None = None):
        self.config, self.folder, self.given = config, Path(folder), dict(given or {})
        device = torch.device(config["device"])
        keep_freed_memory()
        torch.manual_seed(config["seed"])
        content = ItemContent.catalogue(config)
        encoder = build_encoder(config["encoder"], encoder_settings(config))
        if not isinstance(encoder, TrainableEncoder) or not {"visual", "textual"} <= set(encoder.modalities):
            raise UserError(f"{config['encoder']} has no joint space of pictures and texts to fine-tune. Take clip, tiny-clip or vlmo.")
        encoder.fit(content)
        encoder.freeze(config["encoder_freeze_blocks"] or 0)
        encoder.set_checkpointing(bool(config["encoder_gradient_checkpointing"]))
        self.encoder = encoder.to(device)
        distributed.broadcast_tensors(encoder.parameters())
        self.inputs = CatalogueInputs(encoder, content, device)
        pairs = self.inputs.has("joint").nonzero().squeeze(1)
        if len(pairs) < 4:
            raise UserError(
                f"finetune needs items with both a picture and a text, {config['dataset']!r} has {len(pairs)}. Check image_folder and text_fields."
            )
        share = config["finetune_valid_share"]
        held = max(2, round(len(pairs) * share))
        if not 0 < share < 1 or len(pairs) - held < 2:
            raise UserError(
                f"finetune_valid_share: expected a share above 0 that leaves pairs on both sides, got {share} of {len(pairs)} pairs."
            )
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(config["seed"]))
        self.valid_items, self.train_items = pairs[order[:held]], pairs[order[held:]]
        self.batch_size, self.micro = config["finetune_batch_size"], config["finetune_micro_batch"]
        if self.batch_size < 2 or self.micro < 1:
            raise UserError(
                f"finetune_batch_size: expected at least 2 and micro-batches of at least 1, got {self.batch_size} and {self.micro}."
            )
        self.epochs = config["finetune_epochs"]
        batches = max(1, len(self.train_items) // self.batch_size)
        self.steps = self.epochs * batches
        self.optimizer = torch.optim.AdamW(
            decay_groups(encoder, config["finetune_learning_rate"], config["finetune_weight_decay"]), betas=(0.9, 0.98), eps=1e-6
        )
        self.amp = _AMP.get(config["finetune_amp"])
        self.scaler = torch.amp.GradScaler(device.type, enabled=config["finetune_amp"] == "fp16" and device.type == "cuda")
        self.losses = VLMoLosses(self) if config["encoder_variant"] else ContrastiveLoss(self)
        self.step, self.epoch, self.waited = 0, 0, 0
        self.best = float("inf")
        self.history: list[dict] = []

    # --- training ---------------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until the epochs are over or the validation loss has not fallen for `finetune_patience` of them."""
        if distributed.is_main():  # what a killed process left half-written, before its first checkpoint or later
            clear_leftovers(self.folder)
        while self.epoch < self.epochs and self.waited < self.config["finetune_patience"]:
            begin = time.perf_counter()
            train_loss = self._train_epoch()
            valid = self.validate()
            self.history.append({"epoch": self.epoch, "train_loss": train_loss, **valid, "time_s": round(time.perf_counter() - begin, 2)})
            better = valid["valid_loss"] < self.best
            self.best, self.waited = (valid["valid_loss"], 0) if better else (self.best, self.waited + 1)
            self.epoch += 1
            if not distributed.is_main():
                continue
            if better:
                self._save_weights()
            self._save()
            print(
                f"epoch {self.epoch}/{self.epochs}: train loss {train_loss:.4f}, valid loss {valid['valid_loss']:.4f}, "
                f"valid recall@1 {valid['recall@1']:.3f}, {self.history[-1]['time_s']:.1f} s",
                flush=True,
            )

    def _rate(self) -> float:
        """Share of the peak learning rate at the current step: linear warm-up, then linear decay to 0."""
        warm = max(1, round(self.config["finetune_warmup"] * self.steps))
        if self.step < warm:
            return (self.step + 1) / warm
        return max(0.0, (self.steps - self.step) / max(1, self.steps - warm))

    def _train_epoch(self) -> float:
        self.encoder.train()
        distributed.same_generators(everything=True)
        order = self.train_items[torch.randperm(len(self.train_items))]
        batches = [b for b in order.split(self.batch_size) if len(b) == self.batch_size] or [order]
        total = 0.0
        for batch in batches:
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate() * self.config["finetune_learning_rate"]
            self.optimizer.zero_grad()
            loss = self.losses.backward(batch)
            distributed.average_gradients(self.encoder.parameters())
            distributed.same_generators()
            if not torch.isfinite(torch.tensor(loss)):
                raise UserError(f"The fine-tuning loss is no longer a number (epoch {self.epoch}). Lower finetune_learning_rate.")
            total += loss
            if self.config["finetune_max_grad_norm"]:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.encoder.parameters(), self.config["finetune_max_grad_norm"])
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.losses.after_step()
            self.step += 1
        return total / len(batches)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the held-out pairs, with the same random draws every time, and the share of pictures whose own text is nearest."""
        self.encoder.eval()
        state = checkpoint.random_state()
        torch.manual_seed(self.config["seed"])
        images, texts = self._features(self.valid_items)
        # on GPUs the last digits may differ between processes, and all must stop in the same epoch
        loss = distributed.broadcast_value(self.losses.validation(self.valid_items, images, texts))
        hits = ((images @ texts.t()).argmax(dim=1).cpu() == torch.arange(len(images))).float().mean().item()
        checkpoint.set_random_state(state)
        return {"valid_loss": loss, "recall@1": hits}

    def _features(self, items: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for whole in items.split(self.micro):
            with share_of(whole) as take:
                ids = take(whole)
                found = self.encoder.pair_features(self.inputs.images(ids), self.inputs.texts(ids))
                parts.append(distributed.gather_rows(*(f.float() for f in found)))
        return torch.cat([i for i, _ in parts]), torch.cat([t for _, t in parts])

    def images(self, items: Tensor) -> Tensor:
        """Training pictures of the own share of `items`, each cropped at random to at least `finetune_crop` of its area and mirrored at random."""
        images = self.inputs.images(own(items))
        if not self.encoder.training:
            return images
        if self.config["finetune_crop"] < 1:
            images = random_crops(images, self.config["finetune_crop"], len(items))
        if self.config["finetune_mirror"]:
            mirrored = own(torch.rand(len(items), device=images.device)) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images

    def texts(self, items: Tensor) -> Tensor:
        """Training texts of the own share of `items`, each word piece blanked with probability `finetune_word_dropout`: article numbers teach only what to memorise."""
        ids, rate = self.inputs.texts(own(items)), self.config["finetune_word_dropout"]
        if not self.encoder.training or not rate:
            return ids
        drawn = own(torch.rand(len(items), *ids.shape[1:], device=ids.device))
        return torch.where((drawn < rate) & self.encoder.is_word(ids), self.encoder.blank, ids)

    def autocast(self):
        return torch.autocast(self.inputs.device.type, dtype=self.amp, enabled=self.amp is not None)

    # --- files ------------------------------------------------------------------------------------------------------------------

    def _save_weights(self) -> None:
        """Write the weights beside the old ones and then swap the folders, so that a kill leaves one whole set."""
        new, old, place = (self.folder / name for name in (f"{WEIGHTS}.new", f"{WEIGHTS}.old", WEIGHTS))
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        self.encoder.save(new)
        if place.exists():
            place.rename(old)
        new.rename(place)
        shutil.rmtree(old, ignore_errors=True)

    def _save(self) -> None:
        checkpoint.save(
            self.folder / LAST_FILE,
            {
                "given": self.given,
                "weights": self.encoder.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": checkpoint.random_state(),
                "step": self.step,
                "epoch": self.epoch,
                "waited": self.waited,
                "best": self.best,
                "history": self.history,
            },
        )

    def resume(self) -> None:
        """Continue from the folder's checkpoint."""
        state = checkpoint.load(self.folder / LAST_FILE, self.inputs.device)
        self.encoder.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for key in ("step", "epoch", "waited", "best", "history"):
            setattr(self, key, state[key])
        checkpoint.set_random_state(state["random"])

    def finish(self) -> Path:
        """Write the record; the best weights are in the folder it returns."""
        record = {
            "schema": 1,
            "encoder": self.config["encoder"],
            "dataset": self.config["dataset"],
            "settings": {
                k: v for k, v in self.config.final_config_dict.items() if k.startswith(("finetune_", "encoder_")) or k == "pretrained"
            },
            "seed": self.config["seed"],
            "pairs": {"train": len(self.train_items), "valid": len(self.valid_items)},
            "best_valid_loss": self.best,
            "epochs": self.history,
        }
        record["processes"] = distributed.world()[1]
        if distributed.is_main():
            write_json(self.folder / RUN_FILE, record)
        distributed.barrier()  # the weights are there
        return self.folder / WEIGHTS


@contextlib.contextmanager
def share_of(items: Tensor):
    """Share `items` among the processes for a while; gives the function that takes the own ones."""
    share = distributed.Share.of(len(items))
    with distributed.sharing(share):
        yield (lambda column: column) if share is None else share.take


def own(column: Tensor) -> Tensor:
    """The rows of a column of the whole micro-batch that are this process's."""
    share = distributed.active()
    return column if share is None else share.take(column)


def random_crops(images: Tensor, area: float, whole: int | None = None) -> Tensor:
    """Cut a square of `area` to 1 of each picture's area at a random place and bring it back to full size, [B, 3, S, S].

    `whole` is the size of the micro-batch of which the pictures are the own share: its draws are made, and the own ones taken.
    """
    n, device = len(images) if whole is None else whole, images.device
    edge = (area + (1 - area) * torch.rand(n, device=device)).sqrt()
    shift = (torch.rand(n, 2, device=device) * 2 - 1) * (1 - edge)[:, None]
    edge, shift, n = own(edge), own(shift), len(images)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = edge, edge, shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


class ContrastiveLoss:
    """CLIP's loss over a batch of any size, with the memory of a micro-batch."""

    def __init__(self, tuner: Finetuner):
        self.tuner, self.encoder = tuner, tuner.encoder

    def features(self, items: Tensor) -> list[Tensor]:
        """What the loss compares, each [b, E], of the own share of `items`."""
        with self.tuner.autocast():
            return list(self.encoder.pair_features(self.tuner.images(items), self.tuner.texts(items)))

    def loss(self, features: list[Tensor]) -> Tensor:
        return vlmo.contrast(vlmo.similarities(features[0].float(), features[1].float(), self.encoder.logit_scale))

    def backward(self, items: Tensor) -> float:
        """Put the gradient of the batch's loss into the parameters; the loss."""
        return cached_step(items.split(self.tuner.micro), self.features, self.loss, self.tuner.scaler)[0]

    def after_step(self) -> None:
        with torch.no_grad():
            self.encoder.logit_scale.clamp_(max=_LARGEST_SCALE)

    def validation(self, items: Tensor, images: Tensor, texts: Tensor) -> float:
        return vlmo.contrast(vlmo.similarities(images, texts, self.encoder.logit_scale)).item()


class VLMoLosses(ContrastiveLoss):
    """VLMo's three losses; the contrast over the whole batch also gives the weights from which hard negatives are drawn."""

    def features(self, items: Tensor) -> list[Tensor]:
        network, texts = self.encoder.network, self.tuner.texts(items)
        with self.tuner.autocast():
            image = network.image(self.tuner.images(items), vl_branch=True)
            text = network.text(texts, (texts != self.encoder.pieces.pad).long(), vl_branch=True)
        return [image["cls_feats"], text["cls_feats"], image["cls_vlffn_feats"], text["cls_vlffn_feats"]]

    def loss(self, features: list[Tensor]) -> Tensor:
        image, text, vl_image, vl_text = (f.float() for f in features)
        network = self.encoder.network
        plain = vlmo.contrast(vlmo.similarities(image, text, network.logit_scale))
        return (plain + vlmo.contrast(vlmo.similarities(vl_image, vl_text, network.logit_vl_scale))) / 2

    def backward(self, items: Tensor) -> float:
        total, features = cached_step(items.split(self.tuner.micro), self.features, self.loss, self.tuner.scaler)
        logits = vlmo.similarities(features[0].float(), features[1].float(), self.encoder.logit_scale.detach())
        distributed.same_generators()
        processes = distributed.world()[1]
        rest = torch.zeros(())
        for loss in self.own_losses(items, logits):
            self.tuner.scaler.scale(loss * processes).backward()  # the mean over the processes becomes the sum of their parts
            rest += loss.item()
        return total + distributed.all_sum(rest).item()

    def own_losses(self, items: Tensor, logits: Tensor):
        """Yield matching and masked-word losses of this process's part of the micro-batches, each with its share of the batch's mean."""
        to_text, to_image = vlmo.matching_weights(logits, len(items))
        drawn_images, drawn_texts = items[vlmo.draw(to_image).cpu()], items[vlmo.draw(to_text).cpu()]
        network, inputs = self.encoder.network, self.tuner.inputs
        words = inputs.texts(items)
        masked, labels = self.encoder.mask_for_training(words)
        count = (labels != vlmo.IGNORE).sum().clamp(min=1)
        for whole in torch.arange(len(items)).split(self.tuner.micro):
            with share_of(whole) as take:
                rows = take(whole)
                images = self.tuner.images(items[whole])
                ids = words[rows]
                mask = self._mask(ids)
                negative_ids = inputs.texts(drawn_texts[rows])
                with self.tuner.autocast():
                    drawn = self.tuner.images(drawn_images[whole])
                    itm, _, _ = vlmo.matching(network, images, ids, mask, drawn, (negative_ids, self._mask(negative_ids)))
                    # a micro-batch too small to share is computed by all, who then have an equal part in it
                    part = 1 if distributed.active() else 1 / distributed.world()[1]
                    yield part * itm * len(rows) / len(items)
                    mlm, _ = vlmo.masked_words(network, images, masked[rows], mask, labels[rows])
                    yield part * mlm * (labels[rows] != vlmo.IGNORE).sum() / count

    def _mask(self, ids: Tensor) -> Tensor:
        return (ids != self.encoder.pieces.pad).long()

    def after_step(self) -> None:
        """VLMo's scales are not clipped."""

    def validation(self, items: Tensor, images: Tensor, texts: Tensor) -> float:
        logits = vlmo.similarities(images, texts, self.encoder.logit_scale)
        rest = torch.tensor(sum(loss.item() for loss in self.own_losses(items, logits)))
        return vlmo.contrast(logits).item() + distributed.all_sum(rest).item()


def cached_step(micro_batches: Sequence[Tensor], features, loss, scaler=None) -> tuple[float, list[Tensor]]:
    """Gradient of a loss over all micro-batches' features, with the memory of one micro-batch.

    Args:
        micro_batches: item ids.
        features: item ids -> list of features [b, E], with random draws from the global generators.
        loss: list of features of the whole batch [B, E] -> scalar.
        scaler: for half precision; scales the loss.

    Returns:
        the loss, and the features without a graph.
    """
    from recbole_mm.model.bank import generator_states, set_generator_states

    scale = (lambda x: x) if scaler is None else scaler.scale
    processes = distributed.world()[1]
    if len(micro_batches) == 1 and processes == 1:
        found = features(micro_batches[0])
        value = loss(found)
        scale(value).backward()
        return value.item(), [f.detach() for f in found]
    states, parts = [], []
    with torch.no_grad():
        for items in micro_batches:
            states.append(generator_states())
            with share_of(items):
                parts.append(distributed.gather_rows(*features(items)))
    whole = [torch.cat(column).requires_grad_() for column in zip(*parts)]
    value = loss(whole)  # every process computes it over all pairs, so the mean of their gradients is right for its own parameters
    scale(value).backward()
    after, begin = generator_states(), 0
    for items, state in zip(micro_batches, states):
        set_generator_states(state)
        with share_of(items) as take:
            # own rows only: the mean over the processes has to become their sum
            factor = 1 if distributed.active() is None else processes
            gradients = [factor * take(f.grad[begin : begin + len(items)]) for f in whole]
            torch.autograd.backward(features(items), gradients)
        begin += len(items)
    set_generator_states(after)
    return value.item(), [f.detach() for f in whole]
