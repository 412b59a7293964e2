"""recbole-mm perpeft-analysis: what PerPEFT adds in parameters and time, and what each group's CLIP looks at.

The paper's Fig. 4 (parameters and training time against Global PEFT) and Fig. 6 (attention of the groups' encoders on one item).
Each command writes a table (Markdown and JSON) and a PNG picture.
"""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from recbole_mm.errors import UserError, nearest
from recbole_mm.files import atomic_path, write_json, write_text
from recbole_mm.parsing import parse_arguments

USAGE = """\
recbole-mm perpeft-analysis parameters [--run=RUN] [--kinds=lora,ia3,iisan] [--groups=8] [--output=FOLDER]
    parameters added per group and in all, for the CLIP of RUN (default: the sizes of ViT-B/32)
recbole-mm perpeft-analysis time --runs=RUN,RUN,... [--output=FOLDER]
    seconds per training epoch, personalised against global
recbole-mm perpeft-analysis attention --run=RUN [--items=3 | --items=TOKEN,TOKEN] [--output=FOLDER]
    heat maps of each group's CLIP on pictures and texts; a number takes the items on which the groups differ most

RUN is a run directory of PerPEFTSASRec. FOLDER is RUN/figures by default, or perpeft-analysis without a run.
"""

#: colours of a heat map from cold to hot, evenly spaced
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=float)
BAR, INK, PAPER = (58, 110, 165), (30, 30, 30), (255, 255, 255)


def main(arguments: Sequence[str]) -> int:
    """The command line; see USAGE."""
    commands = {"parameters": parameters, "time": training_time, "attention": attention}
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[0] not in commands:
        raise UserError(f"perpeft-analysis: expected one of {', '.join(commands)}, got {words[0]!r}.{nearest(words[0], commands)}")
    given = parse_arguments(words[1:])
    allowed = {"parameters": {"run", "kinds", "groups", "output"}, "time": {"runs", "output"}, "attention": {"run", "items", "output"}}
    for key in given:
        if key not in allowed[words[0]]:
            raise UserError(f"perpeft-analysis {words[0]}: unknown option --{key}.{nearest(key, allowed[words[0]])}")
    print(commands[words[0]](**given))
    return 0


def _list(value) -> list[str]:
    return [str(v).strip() for v in (value if isinstance(value, list) else str(value).split(",")) if str(v).strip()]


# parameters


def count_parameters(clip_config, kind: str, targets=None, arguments=None, iisan_states: int = 7, iisan_hidden: int = 32) -> int:
    """Parameters that one adapter of `kind` adds to a CLIP of these sizes; nothing is allocated."""
    from transformers import CLIPModel

    from recbole_mm.layer.adapter import IISAN
    from recbole_mm.model.perpeft.encoder import attach_adapters

    with torch.device("meta"):
        if kind == "iisan":
            side = IISAN(clip_config.vision_config.hidden_size, clip_config.text_config.hidden_size, iisan_states, iisan_hidden)
            return sum(p.numel() for p in side.parameters())
        clip = CLIPModel(clip_config)
    base = {id(p) for p in clip.parameters()}
    adapted = attach_adapters(clip, kind, ["group"], targets, arguments)
    return sum(p.numel() for p in adapted.parameters() if id(p) not in base and p.requires_grad)


def parameters(run=None, kinds="lora,ia3,iisan", groups=8, output=None) -> str:
    """Table and bars of the parameters that each kind adds; a run's own kind is counted with the run's settings."""
    from transformers import CLIPConfig, CLIPModel

    config, settings = CLIPConfig(), {}
    if run is not None:
        from recbole_mm.quick_start import read_settings

        settings = read_settings(run)
        config = _clip_config(settings)
    with torch.device("meta"):
        total = sum(p.numel() for p in CLIPModel(config).parameters())
    depth = min(config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    rows = []
    for kind in _list(kinds):
        own = kind == settings.get("peft_kind")
        arguments = dict(settings.get("peft_arguments") or {}) if own else {}
        if kind == "lora":
            arguments = {"r": settings.get("peft_rank", 4), "lora_alpha": settings.get("peft_alpha", 8), **arguments}
        states = settings.get("iisan_states", 7) if own else min(7, depth + 1)
        added = count_parameters(config, kind, settings.get("peft_target_modules") if own else None, arguments, states)
        rows.append(
            {"kind": kind, "per_group": added, "groups": int(groups), "total": added * int(groups), "share": added * int(groups) / total}
        )
    folder = _folder(output, run)
    table = ["| kind | parameters per group | groups | in all | share of CLIP |", "|---|---:|---:|---:|---:|"]
    table += [f"| {r['kind']} | {r['per_group']:,} | {r['groups']} | {r['total']:,} | {r['share']:.2%} |" for r in rows]
    text = f"CLIP has {total:,} parameters.\n\n" + "\n".join(table)
    write_text(folder / "perpeft_parameters.md", text + "\n")
    write_json(folder / "perpeft_parameters.json", {"clip": total, "kinds": rows})
    bars = [(f"{r['kind']}, {r['groups']} groups", 100 * r["share"]) for r in rows]
    draw_bars(folder / "perpeft_parameters.png", "Parameters added, % of CLIP", bars, "{:.2f} %")
    return f"{text}\n\nWritten to {folder}"


def _clip_config(settings: dict):
    """The configuration of a run's CLIP, without its weights."""
    from transformers import CLIPConfig

    from recbole_mm.encoder.clip import transformers_sizes
    from recbole_mm.encoder.weights import hub_or_path

    if settings.get("pretrained") is None and settings.get("encoder_sizes") is not None:
        return transformers_sizes(settings["encoder_sizes"], settings.get("encoder_image_size"))
    source = hub_or_path(str(settings.get("pretrained") or settings.get("encoder_model")))
    return CLIPConfig.from_pretrained(source) if source else CLIPConfig()


# time


def training_time(runs=None, output=None) -> str:
    """Seconds per epoch of each run's global and personalised part, from its record."""
    if runs is None:
        raise UserError("perpeft-analysis time: expected --runs=RUN,RUN,... (run directories of PerPEFTSASRec).")
    rows = []
    for run in _list(runs):
        record, settings = _record(run)
        scope, kind = settings["peft_scope"], settings["peft_kind"] if settings["peft_scope"] != "none" else "-"
        seconds = [epoch["time_s"] for epoch in record["epochs"]]
        first = settings["global_epochs"] if scope == "personalized" else len(seconds)
        for part, values in (("global" if scope != "none" else "frozen", seconds[:first]), ("personalized", seconds[first:])):
            if values:
                rows.append(
                    {"run": Path(run).name, "kind": kind, "part": part, "epochs": len(values), "median_s": float(np.median(values))}
                )
    reference = {}
    for row in rows:
        if row["part"] == "global":
            reference.setdefault(row["kind"], []).append(row["median_s"])
    for row in rows:
        base = reference.get(row["kind"])
        row["against_global"] = row["median_s"] / float(np.mean(base)) if base else None
    folder = _folder(output, _list(runs)[0])
    table = ["| run | kind | part | epochs | seconds per epoch | against global PEFT |", "|---|---|---|---:|---:|---:|"]
    for r in rows:
        ratio = "-" if r["against_global"] is None else f"{r['against_global']:.2f} x"
        table.append(f"| {r['run']} | {r['kind']} | {r['part']} | {r['epochs']} | {r['median_s']:.2f} | {ratio} |")
    text = "\n".join(table)
    write_text(folder / "perpeft_time.md", text + "\n")
    write_json(folder / "perpeft_time.json", rows)
    draw_bars(
        folder / "perpeft_time.png", "Seconds per training epoch", [(f"{r['kind']} {r['part']}", r["median_s"]) for r in rows], "{:.2f} s"
    )
    return f"{text}\n\nWritten to {folder}"


def _record(run) -> tuple[dict, dict]:
    from recbole_mm.quick_start import read_settings

    settings = read_settings(run)
    if settings["model"] != "PerPEFTSASRec":
        raise UserError(f"{run} is a run of {settings['model']}; perpeft-analysis reads runs of PerPEFTSASRec.")
    file = Path(run) / "result.json"
    if not file.is_file():
        raise UserError(f"{run} has no result.json; is the run finished?")
    return json.loads(file.read_text(encoding="utf-8")), settings


# attention


@torch.no_grad()
def attention_maps(encoder, items: Tensor, group: int | None) -> tuple[Tensor, list[Tensor]]:
    """How much the last layer's class token looks at each patch and the end token at each word piece, mean over heads, each summing to 1.

    Args:
        encoder: a PeftEncoder.
        items: item ids [n].
        group: whose adapter; None is the CLIP without adapters.

    Returns:
        patches [n, h, w], and for each item the weights of its word pieces (start and end token left out).
    """
    base, clip = encoder.items, encoder.items.clip
    implementation = clip.config._attn_implementation
    clip.set_attn_implementation("eager")  # the fused kernels keep no weights
    if group is None:
        for layer in encoder.layers:
            layer.enable_adapters(False)
    else:
        encoder.activate(group)
    try:
        looks = clip.vision_model(base.images(items), output_attentions=True).attentions[-1].float().mean(1)[:, 0, 1:]
        words = clip.text_model(base.tokens[items].long(), output_attentions=True).attentions[-1].float().mean(1)
    finally:
        if group is None:
            for layer in encoder.layers:
                layer.enable_adapters(True)
            encoder.active = None
            encoder.activate(0)
        clip.set_attn_implementation(implementation)
    edge = round(looks.shape[1] ** 0.5)
    ends = (base.length[items] - 1).tolist()
    texts = [weights[end, 1:end] for weights, end in zip(words, ends)]
    return (looks / looks.sum(1, keepdim=True)).view(-1, edge, edge), [w / w.sum().clamp(min=1e-12) for w in texts]


def attention(run=None, items=3, output=None) -> str:
    """Heat maps of some items under every group's adapter, one PNG an item."""
    if run is None:
        raise UserError("perpeft-analysis attention: expected --run=RUN (a run directory of PerPEFTSASRec).")
    from recbole_mm.model.perpeft.encoder import PeftEncoder
    from recbole_mm.quick_start import load_model

    _record(run)
    loaded = load_model(run)
    model = loaded.model.eval()
    encoder = model.network.encoder
    if not isinstance(encoder, PeftEncoder):
        raise UserError(
            "Attention maps need adapters inside CLIP (peft_scope global or personalized, peft_kind other than iisan); "
            f"{run} has {loaded.config['peft_kind']} with peft_scope {loaded.config['peft_scope']}."
        )
    groups = sorted(set(model.user_group[1:].tolist()))
    dataset = loaded.dataset
    chosen = _choose(items, dataset, encoder, groups)
    maps = {"CLIP": attention_maps(encoder, chosen, None)}
    maps |= {f"group {g}": attention_maps(encoder, chosen, g) for g in groups}
    folder = _folder(output, run)
    written = []
    for row, item in enumerate(chosen.tolist()):
        token = str(dataset.id2token(dataset.iid_field, item))
        picture = encoder.items.pixels(chosen[row : row + 1].cpu())[0].permute(1, 2, 0).numpy()
        columns = {name: (patches[row].cpu().numpy(), words[row].cpu().numpy()) for name, (patches, words) in maps.items()}
        path = folder / f"perpeft_attention_{_file_name(token)}.png"
        draw_attention(path, dataset.content.title(item) or token, picture, _word_pieces(encoder.items, item), columns)
        written.append(str(path))
    return "\n".join(written)


def _file_name(token: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in token)[:80]


def _choose(items, dataset, encoder, groups: list[int]) -> Tensor:
    """The items named, or the `items` whose maps differ most between the groups, among 256 of the catalogue."""
    device = encoder.items.tokens.device
    if not isinstance(items, int) and not str(items).isdigit():
        known = dataset.field2token_id[dataset.iid_field]
        for token in _list(items):
            if token not in known:
                raise UserError(f"--items: the data set has no item {token!r}.{nearest(token, list(known)[:5000])}")
        return torch.tensor([known[token] for token in _list(items)], device=device)
    some = torch.linspace(1, dataset.item_num - 1, min(256, dataset.item_num - 1)).long().to(device)
    patches = torch.stack([attention_maps(encoder, some, group)[0].flatten(1) for group in groups])
    spread = (patches - patches.mean(0)).abs().sum((0, 2))
    return some[spread.topk(min(int(items), len(some))).indices]


def _word_pieces(items, item: int) -> list[str]:
    import open_clip

    decoder = open_clip.SimpleTokenizer().decoder
    end = int(items.length[item]) - 1
    return [decoder[i].replace("</w>", " ") for i in items.tokens[item, 1:end].tolist()]


# drawing


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Values in 0 .. 1 -> RGB in 0 .. 255, same shape with three channels behind."""
    place = np.clip(values, 0, 1) * (len(HEAT) - 1)
    low = np.minimum(place.astype(int), len(HEAT) - 2)
    share = (place - low)[..., None]
    return HEAT[low] * (1 - share) + HEAT[low + 1] * share


def draw_attention(path: Path, title: str, picture: np.ndarray, pieces: list[str], columns: dict, edge: int = 168) -> None:
    """One column per map: the picture under its heat, and the text with its word pieces shaded. Scales are the same in all columns."""
    font, gap, line = ImageFont.load_default(13), 10, 18
    text_height = line * (len(pieces) + 1)
    width = gap + (edge + gap) * (1 + len(columns))
    canvas = Image.new("RGB", (width, 3 * line + edge + gap + text_height), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 4), textwrap.shorten(title, max(20, width // 8)), fill=INK, font=font)
    photo = Image.fromarray(picture).resize((edge, edge), Image.Resampling.BICUBIC)
    canvas.paste(photo, (gap, 2 * line))
    draw.text((gap, line + 2), "picture", fill=INK, font=font)
    top = max(float(patches.max()) for patches, _ in columns.values())
    low = min(float(patches.min()) for patches, _ in columns.values())
    top_word = max([float(words.max()) for _, words in columns.values() if len(words)] or [1.0])
    for index, (name, (patches, words)) in enumerate(columns.items(), start=1):
        left = gap + index * (edge + gap)
        draw.text((left, line + 2), name, fill=INK, font=font)
        scaled = Image.fromarray(((patches - low) / max(top - low, 1e-12)).astype(np.float32)).resize(
            (edge, edge), Image.Resampling.BICUBIC
        )
        heat = heat_colours(np.asarray(scaled))
        canvas.paste(Image.fromarray((0.4 * np.asarray(photo) + 0.6 * heat).astype(np.uint8)), (left, 2 * line))
        for row, (piece, weight) in enumerate(zip(pieces, words)):
            y = 2 * line + edge + gap + row * line
            shade = float(weight) / top_word
            draw.rectangle((left, y, left + edge, y + line - 2), fill=tuple(int(255 - shade * (255 - c)) for c in (230, 110, 30)))
            draw.text((left + 4, y), f"{piece.strip()}  {float(weight):.2f}", fill=INK, font=font)
    with atomic_path(path) as temporary:
        canvas.save(temporary)


def draw_bars(path: Path, title: str, bars: list[tuple[str, float]], number: str) -> None:
    """Horizontal bars with their values."""
    font, line, left, length = ImageFont.load_default(14), 28, 220, 380
    canvas = Image.new("RGB", (left + length + 120, line * (len(bars) + 1) + 20), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((10, 8), title, fill=INK, font=font)
    top = max([value for _, value in bars] or [1.0]) or 1.0
    for row, (label, value) in enumerate(bars, start=1):
        y = 10 + row * line
        draw.text((10, y), label, fill=INK, font=font)
        end = left + max(1, int(length * value / top))
        draw.rectangle((left, y, end, y + line - 10), fill=BAR)
        draw.text((end + 8, y), number.format(value), fill=INK, font=font)
    with atomic_path(path) as temporary:
        canvas.save(temporary)


def _folder(output, run) -> Path:
    return Path(output) if output else Path(run) / "figures" if run else Path("perpeft-analysis")
