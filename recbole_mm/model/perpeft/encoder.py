r"""Item encoders of PerPEFT: a frozen CLIP, the same with one PEFT adapter per group, and IISAN on its cached hidden states.

All are called as ``encoder(items [n], group) -> [n, F]`` with distinct real item ids, and have ``out_features`` = F and
``copy_group(source, target)``. The base exists once; its weights are frozen, kept in `dtype`, and left out of checkpoints.

Shapes: n items, S picture edge, L text length, P joint width of CLIP, V / T width of the picture / text tower, K cached states.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from recbole_mm.encoder.clip import TransformersNetwork
from recbole_mm.errors import UserError, nearest
from recbole_mm.layer.adapter import IISAN

#: modules that a kind adapts unless told otherwise, in both towers (PerPEFT, Sec. 5.1 and its code); other kinds take LoRA's
TARGETS = {"ia3": ["k_proj", "v_proj", "fc1"]}
DEFAULT_TARGETS = ["q_proj", "v_proj"]


class CLIPItems(nn.Module):
    """A frozen CLIP and what it reads of each item.

    Args:
        network: transformers' CLIP with its picture transform and end token.
        pixels: ids [n] -> uint8 pictures [n, 3, S, S].
        tokens: token ids of every item's text, [I, L].
        dtype: of the frozen weights and of the activations.
        chunk: items encoded at a time.
    """

    def __init__(
        self, network: TransformersNetwork, pixels: Callable[[Tensor], Tensor], tokens: Tensor, dtype=torch.float32, chunk: int = 64
    ):
        super().__init__()
        self.clip = network.model.requires_grad_(False)
        self.fingerprint = fingerprint(self.clip)
        self.clip.to(dtype)
        self.dtype, self.chunk = dtype, chunk
        self.pixels = pixels
        scale = 1.0 / (255.0 * torch.tensor(network.transform.std))
        self.register_buffer("pixel_scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_shift", (-torch.tensor(network.transform.mean) * 255.0 * scale).view(3, 1, 1), persistent=False)
        self.register_buffer("tokens", tokens.int(), persistent=False)
        self.register_buffer("length", (tokens == network.end_token).int().argmax(1) + 1, persistent=False)
        self.config = network.model.config

    def images(self, items: Tensor) -> Tensor:
        """Normalised pictures [n, 3, S, S] in the base's dtype."""
        pixels = self.pixels(items.cpu()).to(self.pixel_scale.device, non_blocking=True)
        return torch.addcmul(self.pixel_shift, pixels, self.pixel_scale).to(self.dtype)

    def text_chunks(self, items: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Places in `items` and their token ids, texts of like length together; what follows the longest of a chunk is cut off."""
        for place in self.length[items].argsort(stable=True).split(self.chunk):
            chunk = items[place]
            yield place, self.tokens[chunk, : int(self.length[chunk].max())].long()

    def forward(self, items: Tensor) -> Tensor:
        """Unit vectors of the joint space, picture beside text, [n, 2 P] float32."""
        image = torch.cat(
            [self._unit(self.clip.vision_model, self.clip.visual_projection, self.images(part)) for part in items.split(self.chunk)]
        )
        places, texts = [], []
        for place, ids in self.text_chunks(items):
            places.append(place)
            texts.append(self._unit(self.clip.text_model, self.clip.text_projection, ids))
        text = torch.cat(texts)[torch.cat(places).argsort()]
        return torch.cat((image, text), dim=1)

    @staticmethod
    def _unit(tower: nn.Module, projection: nn.Module, inputs: Tensor) -> Tensor:
        return nn.functional.normalize(projection(tower(inputs).pooler_output).float(), dim=-1)

    @torch.no_grad()
    def hidden_states(self, items: Tensor, layers: Mapping[str, list[int]]) -> tuple[Tensor, Tensor]:
        """States after `layers` (0: the embedding) of the class token and of the end token: [n, K, V] and [n, K, T]."""
        images, texts, places = [], [], []
        for part in items.split(self.chunk):
            states = self.clip.vision_model(self.images(part), output_hidden_states=True).hidden_states
            images.append(torch.stack([states[layer][:, 0] for layer in layers["visual"]], dim=1))
        for place, ids in self.text_chunks(items):
            end = self.length[items[place]] - 1
            states = self.clip.text_model(ids, output_hidden_states=True).hidden_states
            row = torch.arange(len(place), device=ids.device)
            texts.append(torch.stack([states[layer][row, end] for layer in layers["textual"]], dim=1))
            places.append(place)
        return torch.cat(images), torch.cat(texts)[torch.cat(places).argsort()]


def fingerprint(module: nn.Module) -> str:
    """Hash of every weight of `module`, which a checkpoint keeps in place of the frozen weights themselves."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class FrozenEncoder(nn.Module):
    """Features that do not learn: the same table for every group, [I, F] with a zero row for padding."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.out_features = table.shape[1]
        self.register_buffer("table", table, persistent=False)

    def forward(self, items: Tensor, group: int) -> Tensor:
        return self.table[items]

    def copy_group(self, source: int, target: int) -> None:
        """Nothing: there are no adapters."""

    def group_parameters(self, group: int) -> list[nn.Parameter]:
        return []


class IISANEncoder(nn.Module):
    """One IISAN per group on hidden states that were computed once: image [I, K, V], text [I, K, T]."""

    def __init__(self, image_states: Tensor, text_states: Tensor, n_groups: int, hidden: int):
        super().__init__()
        self.register_buffer("image_states", image_states, persistent=False)
        self.register_buffer("text_states", text_states, persistent=False)
        self.sides = nn.ModuleList(
            IISAN(image_states.shape[2], text_states.shape[2], image_states.shape[1], hidden) for _ in range(n_groups)
        )
        self.out_features = self.sides[0].out_features

    def forward(self, items: Tensor, group: int) -> Tensor:
        return self.sides[group](self.image_states[items].float(), self.text_states[items].float())

    def copy_group(self, source: int, target: int) -> None:
        self.sides[target].load_state_dict(self.sides[source].state_dict())

    def group_parameters(self, group: int) -> list[nn.Parameter]:
        """What is trained for one group alone."""
        return list(self.sides[group].parameters())


class PeftEncoder(nn.Module):
    """A frozen CLIP with one adapter per group, made by the peft library; switching groups copies nothing.

    Adapter weights are float32 whatever the base's dtype is.

    Args:
        items: the base with its inputs.
        kind: a method of peft ("lora", "ia3", "lokr", ...).
        n_groups: number of adapters.
        targets: names of the modules to adapt; None takes the kind's default.
        arguments: further arguments of the kind's peft configuration ("r", "lora_alpha", ...).
    """

    def __init__(self, items: CLIPItems, kind: str, n_groups: int, targets: list[str] | None = None, arguments: Mapping | None = None):
        super().__init__()
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.items = items
        self.out_features = 2 * items.config.projection_dim
        self.names = [f"group_{g:03d}" for g in range(n_groups)]  # of one length: peft looks for names inside keys
        frozen = {id(p) for p in items.clip.parameters()}
        peft_model = attach_adapters(items.clip, kind, self.names, targets, arguments)
        self._peft = (peft_model,)  # in a tuple: as a submodule it would list every weight of `items` a second time
        inside = {id(p) for p in items.parameters()}
        self.shared = nn.ParameterList(
            p for p in peft_model.parameters() if id(p) not in inside
        )  # some kinds keep weights outside the base
        self.layers = [module for module in items.clip.modules() if isinstance(module, BaseTunerLayer)]
        self.per_group: list[list[nn.Parameter]] = []
        self.active = None
        for group in range(n_groups):
            self.activate(group)
            known = frozen | {id(p) for others in self.per_group for p in others}
            self.per_group.append([p for p in self.parameters() if p.requires_grad and id(p) not in known])
        self.activate(0)

    def group_parameters(self, group: int) -> list[nn.Parameter]:
        """What is trained for one group alone."""
        return self.per_group[group]

    def activate(self, group: int) -> None:
        """Let the base use the adapter of `group`: a flag in every adapted module.

        peft also freezes the other adapters; that is undone, so that what is trainable does not depend on who came last. Adapters that
        were not used have no gradient, so AdamW neither moves nor decays them.
        """
        if group == self.active:
            return
        for layer in self.layers:
            layer.set_adapter(self.names[group])
        self.active = group
        for parameters in self.per_group:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def forward(self, items: Tensor, group: int) -> Tensor:
        self.activate(group)
        return self.items(items)

    def copy_group(self, source: int, target: int) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        peft_model = self._peft[0]
        state = get_peft_model_state_dict(peft_model, adapter_name=self.names[source])
        set_peft_model_state_dict(peft_model, {key: value.clone() for key, value in state.items()}, adapter_name=self.names[target])


def attach_adapters(clip: nn.Module, kind: str, names: list[str], targets: list[str] | None = None, arguments: Mapping | None = None):
    """Put one adapter of `kind` for each name into the modules of `clip`, in place; returns the ``PeftModel`` around it.

    Raises:
        UserError: when the kind cannot adapt these modules, with peft's own reason.
    """
    from peft import get_peft_model

    peft_model = None
    for name in names:
        config = peft_config(kind, targets, arguments)  # a fresh one each time: peft writes into it
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*multiple adapters.*")
                if peft_model is None:
                    peft_model = get_peft_model(clip, config, adapter_name=name)
                else:
                    peft_model.add_adapter(name, config)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"peft_kind: {kind!r} cannot be put on the modules {getattr(config, 'target_modules', None)} of CLIP ({error}). "
                "Set peft_target_modules or peft_arguments, or choose lora, ia3 or iisan."
            ) from error
    if peft_model.get_base_model() is not clip:
        raise UserError(
            f"peft_kind: {kind!r} wraps the whole network instead of adapting its modules. Choose lora, ia3, iisan or the like."
        )
    return peft_model


def peft_config(kind: str, targets: list[str] | None, arguments: Mapping | None):
    """The configuration object of a peft method, from its name and plain values.

    Raises:
        UserError: for a kind, or an argument, that peft does not have.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {getattr(key, "value", key).lower(): value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = str(kind).lower()
    if name not in known:
        raise UserError(f"peft_kind: expected iisan or a method of the peft library, got {kind!r}.{nearest(name, ['iisan', *known])}")
    fields = {f.name for f in dataclasses.fields(known[name]) if f.init}
    given = dict(arguments or {})
    unknown = [key for key in given if key not in fields]
    if unknown:
        raise UserError(f"peft_arguments: {known[name].__name__} has no argument {unknown[0]!r}.{nearest(unknown[0], fields)}")
    if "target_modules" in fields:
        given.setdefault("target_modules", list(targets or TARGETS.get(name, DEFAULT_TARGETS)))
        if name == "ia3":
            given.setdefault("feedforward_modules", [t for t in given["target_modules"] if t.startswith("fc")])
    try:
        return known[name](**given)
    except (ValueError, TypeError) as error:
        raise UserError(f"peft_arguments: {error}") from error


def spread_layers(n_layers: int, n_states: int) -> list[int]:
    """Evenly spread indices of hidden states, the embedding (0) and the last layer included: 12 layers, 7 states -> 0, 2, ..., 12."""
    return [round(i * n_layers / (n_states - 1)) for i in range(n_states)]
