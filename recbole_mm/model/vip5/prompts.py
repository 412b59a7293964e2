"""The prompt templates, and turning them into token ids without tokenising anything twice.

A source text is put together from arrays of *packed* tokens, one int64 each: the piece id in the low 32 bits, bit 32 set where a word
begins, and above it the visual token that takes the piece's place (item * k + j + 1; 0 for text). Arrays of constant parts, numbers and
names are cached, and a list of items is gathered from one table, so a prompt of 100 candidates costs one indexing operation.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from recbole_mm.errors import UserError, nearest
from recbole_mm.model.vip5.tokenizer import EOS, Pieces
from recbole_mm.parsing import load_yaml
from recbole_mm.paths import properties_dir

_BEGIN = np.int64(1) << 32
_VISUAL_SHIFT = 33
SEPARATORS = (",", "->")
ARGUMENTS = (
    "user_id", "item_id", "groundtruth_item_ids", "user_desc", "item_photo", "item_title", "purchase_history", "candidates", "yes_no",
    "review_headline", "star_rating", "feature", "explanation",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One template. ``{}`` takes the next argument, left to right."""

    id: str
    task: str
    source: str
    source_args: tuple[str, ...]
    target: str
    target_args: tuple[str, ...]

    @property
    def kind(self) -> str:
        """``next`` (answer: an item), ``choice`` (answer: one of the candidates), ``yes_no`` or ``explanation``."""
        if "yes_no" in self.target_args:
            return "yes_no"
        if self.task == "explanation":
            return "explanation"
        return "choice" if "candidates" in self.source_args else "next"

    def text(self, values: Mapping[str, str]) -> tuple[str, str]:
        """Source and target as plain text."""
        return (
            self.source.format(*(values[name] for name in self.source_args)),
            self.target.format(*(values[name] for name in self.target_args)),
        )


def load_prompts(path: str | Path | None = None) -> dict[str, Prompt]:
    """Prompt id -> template; the 29 published ones unless `path` names another file of the same form, yours or one of properties/vip5.

    Raises:
        UserError: for a missing field, an unknown argument or a wrong number of arguments.
    """
    shipped = properties_dir() / "vip5" / (path or "prompts.yaml")
    path = Path(path) if path and (Path(path).is_file() or not shipped.is_file()) else shipped
    entries = load_yaml(path).get("prompts") or []
    prompts = {}
    for entry in entries:
        try:
            prompt = Prompt(
                **{
                    k: tuple(entry[k]) if k.endswith("_args") else str(entry[k])
                    for k in ("id", "task", "source", "source_args", "target", "target_args")
                }  # fmt: skip
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: a prompt ({entry.get('id', 'without id')}) lacks the field {error}.") from None
        for part, names in ((prompt.source, prompt.source_args), (prompt.target, prompt.target_args)):
            unknown = [name for name in names if name not in ARGUMENTS]
            if unknown or part.count("{}") != len(names):
                raise UserError(
                    f"{path}: prompt {prompt.id}: expected one known argument for each {{}} of {part!r}, got {list(names)}."
                    + (nearest(unknown[0], ARGUMENTS) if unknown else "")
                )
        prompts[prompt.id] = prompt
    return prompts


def choose_prompts(prompts: Mapping[str, Prompt], ids: Sequence[str]) -> list[Prompt]:
    """The prompts called `ids`.

    Raises:
        UserError: for an id that does not exist.
    """
    for name in ids:
        if name not in prompts:
            raise UserError(f"Unknown prompt {name!r}.{nearest(name, prompts)} Prompts are listed in properties/vip5/prompts.yaml.")
    return [prompts[name] for name in ids]


def held_out(prompts: Mapping[str, Prompt]) -> set[str]:
    """The last prompt of every task, which the paper keeps for zero-shot evaluation."""
    return {max((p for p in prompts.values() if p.task == task), key=lambda p: int(p.id.split("-")[-1])).id
            for task in {p.task for p in prompts.values()}}  # fmt: skip


@dataclass
class Facts:
    """What prompts talk about. Users and items are ids of the dataset; entry 0 of each sequence is padding.

    Attributes:
        user_number, item_number: the numbers that stand for users and items in texts.
        user_names, titles: texts, or None where the dataset has none.
    """

    user_number: np.ndarray
    item_number: np.ndarray
    user_names: Sequence[str] | None = None
    titles: Sequence[str] | None = None


@dataclass
class Slots:
    """Arguments of one sample; what a template does not use stays empty."""

    user: int = 0
    item: int = 0
    items: np.ndarray | None = None
    separator: int = 0
    yes: bool = False
    headline: str = ""
    stars: str = ""
    feature: str = ""
    explanation: str = ""
    rating: str = ""
    shown_as: np.ndarray | None = None  # items whose numbers stand in the list in place of their own
    answer: int = 0  # the item whose number is the answer, where it is not that of `item`


class Renderer:
    """Turns a template and its arguments into token ids.

    Args:
        facts: numbers, names and titles.
        pieces: the tokenizer.
        visual_tokens: k, visual tokens per item; 0 leaves the placeholders out.
        max_source, max_target: longest source and target in tokens, the end mark included.
    """

    def __init__(self, facts: Facts, pieces: Pieces, visual_tokens: int, max_source: int = 1024, max_target: int = 64):
        self.facts, self.pieces, self.k = facts, pieces, visual_tokens
        self.max_source, self.max_target = max_source, max_target
        self.words = lru_cache(maxsize=200_000)(self._words)
        self.layouts: dict[str, list] = {}
        self._lists = [self._list_table(separator) for separator in SEPARATORS]

    def _words(self, text: str) -> np.ndarray:
        ids = self.pieces.ids(text)
        return ids | np.where(self.pieces.begins[ids], _BEGIN, 0)

    def photo(self, item: int) -> np.ndarray:
        """The k placeholders of an item."""
        visual = (item * self.k + np.arange(self.k, dtype=np.int64) + 1) << _VISUAL_SHIFT
        return self.pieces.photo | _BEGIN | visual

    def _list_table(self, separator: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For every item its tokens in a list (number, pictures, separator): all of them in one array, begin of each, and length."""
        between = self._words(separator)
        rows = [np.concatenate([self._words(str(n)), self.photo(i), between]) for i, n in enumerate(self.facts.item_number)]
        length = np.array([len(row) for row in rows])
        self._separator_length = {**getattr(self, "_separator_length", {}), separator: len(between)}
        return np.concatenate(rows), np.concatenate([[0], np.cumsum(length)[:-1]]), length

    def item_list(self, items: np.ndarray, separator: int) -> np.ndarray:
        """Packed tokens of ``number photo , number photo , ...``."""
        tokens, begin, length = self._lists[separator]
        sizes = length[items]
        ends = np.cumsum(sizes)
        index = np.arange(ends[-1]) + np.repeat(begin[items] - ends + sizes, sizes)
        return tokens[index[: -self._separator_length[SEPARATORS[separator]]]]

    def shuffled_list(self, items: np.ndarray, shown_as: np.ndarray, separator: int) -> np.ndarray:
        """The list of `items` with their own pictures under the numbers of the items `shown_as`."""
        tokens = self.item_list(shown_as, separator)
        if self.k:
            tokens[tokens >> _VISUAL_SHIFT > 0] = np.concatenate([self.photo(item) for item in items])
        return tokens

    def list_length(self, item_ids: np.ndarray) -> np.ndarray:
        """Number of tokens of each item in a list, its separator included."""
        return self._lists[0][2][item_ids]

    def missing(self, prompt: Prompt, fields: Mapping[str, bool]) -> list[str]:
        """Arguments of `prompt` that the dataset cannot give; `fields` says of each optional argument whether it can."""
        return [name for name in (*prompt.source_args, *prompt.target_args) if not fields.get(name, True)]

    def _layout(self, template: str, arguments: tuple[str, ...]) -> list[tuple]:
        """The template as parts: (None, packed tokens) for constant words, (argument names, pattern) for words with arguments."""
        names = iter(arguments)
        parts: list[tuple] = []
        words = re.sub(r"\s+", " ", template).strip().split(" ")
        constant: list[str] = []
        for word in words:
            if "{}" not in word:
                constant.append(word)
                continue
            if constant:
                parts.append((None, self._words(" ".join(constant))))
                constant = []
            parts.append((tuple(next(names) for _ in range(word.count("{}"))), word))
        if constant:
            parts.append((None, self._words(" ".join(constant))))
        return parts

    def value(self, name: str, slots: Slots) -> str:
        """An argument as text."""
        facts = self.facts
        if name == "user_id":
            return str(facts.user_number[slots.user])
        if name in ("item_id", "groundtruth_item_ids"):
            return str(facts.item_number[slots.item])
        if name == "user_desc":
            return facts.user_names[slots.user]
        if name == "item_title":
            return facts.titles[slots.item] or "unknown title"
        if name == "yes_no":
            return "yes" if slots.yes else "no"
        if name == "item_photo":
            return " ".join(["<extra_id_0>"] * self.k)
        if name in ("purchase_history", "candidates"):
            photo = "".join(["<extra_id_0> "] * self.k)
            return f" {SEPARATORS[slots.separator]} ".join(f"{facts.item_number[i]} {photo}".strip() for i in slots.items)
        return {"review_headline": slots.headline, "star_rating": slots.stars, "feature": slots.feature, "explanation": slots.explanation}[
            name
        ]

    def text(self, prompt: Prompt, slots: Slots) -> tuple[str, str]:
        """Source and target as plain text, the way the release writes them."""
        values = {name: self.value(name, slots) for name in (*prompt.source_args, *prompt.target_args)}
        if slots.rating and "star_rating" in prompt.target_args:
            return prompt.text(values)[0], prompt.text({**values, "star_rating": slots.rating})[1]
        return prompt.text(values)

    def source(self, prompt: Prompt, slots: Slots) -> np.ndarray:
        """Packed source tokens, cut to the longest allowed, the end mark included."""
        layout = self.layouts.get(prompt.id)
        if layout is None:
            layout = self.layouts[prompt.id] = self._layout(prompt.source, prompt.source_args)
        parts = []
        for names, content in layout:
            if names is None:
                parts.append(content)
            elif content == "{}" and names[0] == "item_photo":
                parts.append(self.photo(slots.item))
            elif content == "{}" and names[0] in ("purchase_history", "candidates"):
                if slots.shown_as is None:
                    parts.append(self.item_list(slots.items, slots.separator))
                else:
                    parts.append(self.shuffled_list(slots.items, slots.shown_as, slots.separator))
            else:
                parts.append(self.words(content.format(*(self.value(name, slots) for name in names))))
        tokens = np.concatenate(parts)[: self.max_source - 1]
        return np.append(tokens, np.int64(EOS))

    def target(self, prompt: Prompt, slots: Slots) -> np.ndarray:
        """Target ids with the end mark."""
        if prompt.kind in ("next", "choice"):
            ids = self.words(str(self.facts.item_number[slots.answer or slots.item])) & (_BEGIN - 1)
        else:
            values = [slots.rating if n == "star_rating" and slots.rating else self.value(n, slots) for n in prompt.target_args]
            ids = self.words(prompt.target.format(*values)) & (_BEGIN - 1)
        return np.append(ids[: self.max_target - 1], EOS)

    def base_length(self, prompt: Prompt) -> int:
        """Rough number of source tokens without lists; for batches of similar length."""
        if prompt.id not in self.layouts:
            self.layouts[prompt.id] = self._layout(prompt.source, prompt.source_args)
        return sum(len(c) if names is None else self.k if names[0] == "item_photo" else 3 for names, c in self.layouts[prompt.id]) + 1


def unpack(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad packed sources to one batch: token ids, whole-word ids and visual tokens (-1 for text), each [B, S]."""
    lengths = np.array([len(row) for row in rows])
    packed = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    packed[np.arange(packed.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    ids = packed & 0xFFFFFFFF
    words = np.cumsum((packed >> 32) & 1, axis=1)
    words[ids <= EOS] = 0  # the end mark and padding belong to no word
    return ids, words, (packed >> _VISUAL_SHIFT) - 1
