r"""The network of VIP5: T5 with visual tokens, whole-word and category embeddings, and bottleneck adapters.

Source: S. Geng et al., "VIP5: Towards Multimodal Foundation Models for Recommendation", Findings of EMNLP 2023; official release
jeykigung/VIP5, commit 35b8a05 (MIT). Stated anew on the T5 of transformers; the parameter names are those of the official checkpoints.

An adapter is :math:`A(x) = x + U\,\mathrm{gelu}_{\tanh}(D x + b_D) + b_U`, on the output of self-attention, cross-attention and
feed-forward, before dropout and the residual. The visual map turns one feature row into k tokens: linear, tanh, linear, RMS norm over
all k tokens together.

Shapes: B batch, S source tokens, T target tokens, D d_model, V feature rows, F width of a feature row, k visual tokens per item.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5LayerNorm

from recbole_mm.distributed import count_rows, sum_rows
from recbole_mm.errors import UserError

TASKS = ("sequential", "direct", "explanation")
FINE_TUNING = ("self_attn", "self_and_cross_attn", "full")


@dataclass(frozen=True)
class NetworkSettings:
    """Sizes and switches of the network; the names are those of T5's configuration where it has them."""

    vocab_size: int = 32100
    d_model: int = 512
    d_ff: int = 2048
    d_kv: int = 64
    num_heads: int = 8
    num_layers: int = 6
    num_decoder_layers: int = 6
    feed_forward_proj: str = "relu"
    relative_attention_num_buckets: int = 32
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.1
    initializer_factor: float = 1.0
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0
    feat_dim: int = 512
    n_vis_tokens: int = 2
    use_vis_layer_norm: bool = True
    use_adapter: bool = True
    add_adapter_cross_attn: bool = True
    use_single_adapter: bool = True
    reduction_factor: int = 8
    adapter_non_linearity: str = "gelu_new"
    max_whole_words: int = 1024
    max_categories: int = 16
    embedding_std: float | None = None  # of token, word and category embeddings from scratch; None: as T5 and the release, 1
    scale_decoder_outputs: bool = True  # T5's factor d_model^-0.5 before the output layer
    copying: bool = False  # from scratch: see `VIP5Network._start_copying`

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "NetworkSettings":
        """Settings from a mapping that may hold other entries too."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})

    def t5_config(self) -> T5Config:
        names = (
            "vocab_size d_model d_ff d_kv num_heads num_layers num_decoder_layers feed_forward_proj relative_attention_num_buckets "
            "layer_norm_epsilon dropout_rate initializer_factor pad_token_id eos_token_id decoder_start_token_id"
        )
        return T5Config(**{name: getattr(self, name) for name in names.split()})


class Adapter(nn.Module):
    """One bottleneck: [..., D] -> [..., D], with its own residual. An untrained adapter is not the identity."""

    def __init__(self, settings: NetworkSettings):
        super().__init__()
        width = settings.d_model // settings.reduction_factor
        self.down_sampler = nn.Linear(settings.d_model, width)
        self.activation = ACT2FN[settings.adapter_non_linearity]
        self.up_sampler = nn.Linear(width, settings.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up_sampler(self.activation(self.down_sampler(x)))


class TaskAdapters(nn.Module):
    """The adapters of one place: one shared by all tasks (registered under each name, as the official class does), or one per task."""

    def __init__(self, settings: NetworkSettings):
        super().__init__()
        self.shared = settings.use_single_adapter
        first = Adapter(settings)
        self.adapters = nn.ModuleDict({t: first if self.shared or i == 0 else Adapter(settings) for i, t in enumerate(TASKS)})
        self.tasks: Tensor | None = None  # [B] index into TASKS, set by the network before a pass

    def forward(self, x: Tensor) -> Tensor:
        if self.shared:
            return self.adapters[TASKS[0]](x)
        if self.tasks is None:
            raise ValueError("separate adapters need the task of every sample")
        tasks = self.tasks.repeat_interleave(len(x) // len(self.tasks))  # beams of a sample follow one another
        if bool((tasks == tasks[0]).all()):
            return self.adapters[TASKS[int(tasks[0])]](x)
        every = torch.stack([adapter(x) for adapter in self.adapters.values()])
        return every[tasks, torch.arange(len(x), device=x.device)]

    def on_attention(self, module, arguments, output):
        """Forward hook of an attention module, whose output is a tuple."""
        return (self(output[0]), *output[1:])

    def on_feed_forward(self, module, arguments, output):
        """Forward hook of a feed-forward module."""
        return self(output)


class VisualEmbedding(nn.Module):
    """The map from feature rows [N, F] to visual tokens [N * k, D], the k tokens of an item one after another."""

    def __init__(self, settings: NetworkSettings):
        super().__init__()
        width = settings.d_model * settings.n_vis_tokens
        mlp = nn.Module()
        mlp.model = nn.Sequential(nn.Linear(settings.feat_dim, width // 2), nn.Tanh(), nn.Linear(width // 2, width))
        norm = [T5LayerNorm(width, eps=settings.layer_norm_epsilon)] if settings.use_vis_layer_norm else []
        self.feat_embedding = nn.ModuleList([mlp, *norm])
        self.d_model = settings.d_model

    def forward(self, features: Tensor) -> Tensor:
        x = self.feat_embedding[0].model(features)
        for norm in self.feat_embedding[1:]:
            x = norm(x)
        return x.reshape(-1, self.d_model)


class VIP5Network(T5ForConditionalGeneration):
    """T5 with VIP5's additions. ``generate(encoder_outputs=..., attention_mask=...)`` of transformers works on it as it stands.

    Args:
        settings: sizes and switches.
    """

    def __init__(self, settings: NetworkSettings):
        super().__init__(settings.t5_config())
        self.settings = settings
        # made after T5's own initialisation, so that they keep PyTorch's defaults as in the official class
        self.encoder.whole_word_embeddings = nn.Embedding(settings.max_whole_words, settings.d_model)
        self.encoder.category_embeddings = nn.Embedding(settings.max_categories, settings.d_model)
        if settings.embedding_std is not None:
            for table in (self.shared, self.encoder.category_embeddings):
                nn.init.normal_(table.weight, std=settings.embedding_std)
            nn.init.zeros_(self.encoder.whole_word_embeddings.weight)  # places beyond the longest training prompt must not be noise
        self.config.scale_decoder_outputs = settings.scale_decoder_outputs
        if settings.copying:
            self._start_copying()
        if settings.n_vis_tokens:
            self.encoder.visual_embedding = VisualEmbedding(settings)
        if settings.use_adapter:
            self._add_adapters()

    @torch.no_grad()
    def _start_copying(self) -> None:
        """Start from a network that passes tokens on: what cross-attention reads of a token is near the token's own embedding.

        With T5's initialisation each sub-layer adds a random map as large as its input, so an item of the source reaches the output
        layer, which shares its embedding, in a random direction, and a small model needs tens of thousands of steps to turn it back.
        Here every sub-layer adds little, and values and outputs of cross-attention are each other's inverse (orthogonal, where inner
        size and width agree). One head of the first encoder block looks at the next token, which for an item's number is its picture;
        it too adds little, for the number is what must be copied, and a picture at full strength may blur it.
        """
        for stack in (self.encoder, self.decoder):
            for block in stack.block:
                for layer in block.layer:
                    if hasattr(layer, "EncDecAttention"):
                        attention = layer.EncDecAttention
                        nn.init.orthogonal_(attention.v.weight)
                        attention.o.weight.copy_(attention.v.weight.T)
                    else:
                        out = layer.SelfAttention.o if hasattr(layer, "SelfAttention") else layer.DenseReluDense.wo
                        out.weight.mul_(0.2)
        first = self.encoder.block[0].layer[0].SelfAttention
        first.relative_attention_bias.weight[self.settings.relative_attention_num_buckets // 2 + 1, 0] = 5.0  # one place to the right

    def _add_adapters(self) -> None:
        for stack in (self.encoder, self.decoder):
            for block in stack.block:
                block.layer[0].attn_adapter = TaskAdapters(self.settings)
                block.layer[0].SelfAttention.register_forward_hook(block.layer[0].attn_adapter.on_attention)
                if stack.is_decoder and self.settings.add_adapter_cross_attn:
                    block.layer[1].enc_attn_adapter = TaskAdapters(self.settings)
                    block.layer[1].EncDecAttention.register_forward_hook(block.layer[1].enc_attn_adapter.on_attention)
                block.layer[-1].ff_adapter = TaskAdapters(self.settings)
                block.layer[-1].DenseReluDense.register_forward_hook(block.layer[-1].ff_adapter.on_feed_forward)

    def choose_fine_tuning(self, everything: bool) -> None:
        """Leave trainable either everything, or what the paper trains: adapters, layer norms and the visual map."""
        norms = {id(p) for m in self.modules() if isinstance(m, (T5LayerNorm, nn.LayerNorm)) for p in m.parameters()}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(everything or "visual_embedding" in name or "adapter" in name or id(parameter) in norms)

    def set_tasks(self, tasks: Tensor | None) -> None:
        """Tell separate adapters which task each sample of the next pass has: [B] indices into TASKS."""
        if self.settings.use_adapter and not self.settings.use_single_adapter:
            for module in self.modules():
                if isinstance(module, TaskAdapters):
                    module.tasks = tasks

    def embed(self, input_ids: Tensor, whole_word_ids: Tensor, visual: Tensor | None, visual_index: Tensor) -> Tensor:
        """Input of the encoder, [B, S, D].

        Args:
            input_ids: token ids [B, S].
            whole_word_ids: number of the word each token belongs to [B, S]; 0 for the end and padding.
            visual: visual tokens [N, D], the output of the visual map; None without pictures.
            visual_index: row of `visual` that takes the place of a token, -1 for text [B, S].
        """
        place = visual_index >= 0
        x = self.shared(input_ids)
        if visual is not None:
            rows = F.embedding(visual_index.clamp(min=0), visual.to(x.dtype))
            x = torch.where(place[..., None], rows, x)
        return x + self.encoder.whole_word_embeddings(whole_word_ids) + self.encoder.category_embeddings(place.long())

    def visual_tokens(self, features: Tensor) -> Tensor:
        """Visual tokens [N * k, D] of feature rows [N, F]."""
        return self.encoder.visual_embedding(features)

    def encode(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden state of the encoder, [B, S, D]."""
        return self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask).last_hidden_state

    def decode(self, encoded: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced decoder states [B, T, D]; labels may hold -100."""
        return self.decoder(
            input_ids=self._shift_right(labels), encoder_hidden_states=encoded, encoder_attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    def logits(self, encoded: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits [B, T, vocabulary]; labels may hold -100."""
        return self.head(self.decode(encoded, attention_mask, labels))

    def head(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits of decoder states [..., D] for all tokens, or for the tokens `rows` only."""
        weight = self.lm_head.weight if rows is None else self.lm_head.weight.index_select(0, rows)
        return F.linear(hidden * self.settings.d_model**-0.5 if self.settings.scale_decoder_outputs else hidden, weight)

    def new_cache(self) -> EncoderDecoderCache:
        """An empty cache for ``generate``; the one it makes itself has as many layers as the encoder, and fails with a deeper decoder."""
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def encoder_outputs(self, encoded: Tensor) -> BaseModelOutput:
        """What ``generate`` takes as ``encoder_outputs``."""
        return BaseModelOutput(last_hidden_state=encoded)

    def load_official(self, state: Mapping[str, Tensor]) -> list[str]:
        """Load a checkpoint of VIP5, P5 or T5 by its official parameter names; returns what it does not hold and stays as initialised.

        ``module.`` before the names is dropped; rows beyond our vocabulary are cut; the shorter whole-word table of a P5 checkpoint fills
        our first rows. Equal copies of a shared adapter are required to be equal.

        Raises:
            UserError: when a size does not fit or the file has parameters that this network lacks.
        """
        state = {name.removeprefix("module."): value for name, value in state.items()}
        tied = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        table = next((state[name] for name in tied if name in state), None)
        if table is not None:
            state.update({name: table[: self.settings.vocab_size] for name in tied})
        own = self.state_dict()
        words = "encoder.whole_word_embeddings.weight"
        if words in state and state[words].shape[0] < own[words].shape[0] and state[words].shape[1] == own[words].shape[1]:
            state[words] = torch.cat([state[words].to(own[words]), own[words][len(state[words]) :]])
        unknown = [n for n in state if n not in own and not n.endswith("EncDecAttention.relative_attention_bias.weight")]
        if unknown:
            raise UserError(
                f"The checkpoint has {len(unknown)} parameters that this network lacks, e.g. {unknown[0]}. "
                "fine_tuning, visual_tokens and reduction_factor must be those the checkpoint was trained with."
            )
        for name, value in state.items():
            if name in own and tuple(value.shape) != tuple(own[name].shape):
                raise UserError(
                    f"The checkpoint's {name} has shape {tuple(value.shape)}, the network needs {tuple(own[name].shape)}. "
                    "visual_tokens, reduction_factor, the tokenizer and the width of the visual features must fit the checkpoint."
                )
            if self.settings.use_single_adapter and ".adapters." in name:
                place, _, rest = name.partition(".adapters.")
                other = f"{place}.adapters.{TASKS[0]}.{rest.split('.', 1)[1]}"
                if not torch.equal(value, state.get(other, value)):
                    raise UserError(f"The checkpoint has separate adapters per task ({name} differs); set single_adapter: false.")
        self.load_state_dict({n: v for n, v in state.items() if n in own}, strict=False)
        return [name for name in own if name not in state]


def settings_of_checkpoint(state: Mapping[str, Tensor], base: NetworkSettings) -> NetworkSettings:
    """`base` with every size that the parameters of a T5, P5 or VIP5 checkpoint show; what they lack (adapters) is left as in `base`."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    bias = state.get("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    embedding = next((state[n] for n in ("shared.weight", "encoder.embed_tokens.weight", "lm_head.weight") if n in state), None)
    if bias is None or embedding is None:
        raise UserError("The checkpoint is not a T5 model: it has no token embedding or no table of relative positions.")
    inner, d_model = state["encoder.block.0.layer.0.SelfAttention.q.weight"].shape
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in state

    def blocks(stack: str) -> int:
        return 1 + max(int(name.split(".")[2]) for name in state if name.startswith(f"{stack}.block."))

    sizes: dict[str, Any] = {
        "d_model": d_model,
        "d_ff": state["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1],
        "num_heads": bias.shape[1],
        "d_kv": inner // bias.shape[1],
        "num_layers": blocks("encoder"),
        "num_decoder_layers": blocks("decoder"),
        "relative_attention_num_buckets": bias.shape[0],
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }
    down = state.get("encoder.block.0.layer.0.attn_adapter.adapters.sequential.down_sampler.weight")
    if down is not None:
        sizes.update(use_adapter=True, reduction_factor=d_model // down.shape[0])
        sizes["add_adapter_cross_attn"] = any("enc_attn_adapter" in name for name in state)
    last = state.get("encoder.visual_embedding.feat_embedding.0.model.2.weight")
    if last is not None:
        sizes["n_vis_tokens"] = last.shape[0] // d_model
        sizes["feat_dim"] = state["encoder.visual_embedding.feat_embedding.0.model.0.weight"].shape[1]
        sizes["use_vis_layer_norm"] = "encoder.visual_embedding.feat_embedding.1.weight" in state
    if "encoder.category_embeddings.weight" in state:
        sizes["max_categories"] = len(state["encoder.category_embeddings.weight"])
    return replace(base, **sizes)


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parameters and T5 configuration (empty if there is none) from a file or a folder as transformers writes it.

    Raises:
        UserError: when there is no such file, or it holds no parameters.
    """
    path = Path(path)
    names = ("model.safetensors", "pytorch_model.bin", "BEST_EVAL_LOSS.pth")
    file = path if path.is_file() else next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"language_model: {path} is neither a checkpoint file nor a folder with one of {', '.join(names)}.")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(str(file))
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"language_model: {file} cannot be read as a PyTorch file of parameters ({error}).") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"language_model: expected {file} to hold a mapping of parameter names to tensors.")
    config = file.parent / "config.json"
    return state, json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}


def per_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every target token [B, T], 0 where the label is -100."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none").view(labels.shape)


def training_loss(token_loss: Tensor, labels: Tensor, weighting: str) -> Tensor:
    r"""The loss of a batch from its token losses [B, T], with L_b the length of target b.

    ``sample``: :math:`\mathrm{mean}_b \sum_t \ell_{bt} / L_b`. ``token``: mean over all tokens. ``published``: the release's
    :math:`\mathrm{mean}_b \sum_t \ell_{bt} / L_b^2`, in which short targets weigh far more than explanations.
    """
    lengths = (labels != -100).sum(-1)
    if weighting == "token":
        return sum_rows(token_loss.sum()) / count_rows(lengths.sum())
    return (token_loss.sum(-1) / lengths ** (2 if weighting == "published" else 1)).mean()


def log_initialised(names: list[str]) -> None:
    """Tell which parameters a checkpoint did not hold, by group."""
    if names:
        groups = sorted({n.split(".adapters.")[0].rsplit(".", 1)[-1] if ".adapters." in n else n.rsplit(".", 1)[0] for n in names})
        logging.getLogger().info(f"Not in the checkpoint, initialised: {', '.join(groups)}")
