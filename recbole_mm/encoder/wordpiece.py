"""Word pieces for VLMo and sentence encoders: BERT's tokenizer from transformers, with a published or a learned vocabulary."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from recbole_mm.encoder.weights import find_weights, hub_file, weights_folder
from recbole_mm.errors import UserError
from recbole_mm.files import write_text

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PUBLISHED = {"bert-base-uncased": "google-bert/bert-base-uncased"}


class WordPieces:
    """Lower-cased BERT word pieces; ids are padded with [PAD] on the right.

    Args:
        vocabulary: word piece -> id.
    """

    def __init__(self, vocabulary: dict[str, int]):
        from transformers import BertTokenizer

        absent = [token for token in SPECIALS if token not in vocabulary]
        if absent:
            raise UserError(f"The vocabulary has no {', '.join(absent)}: expected the vocab.txt of an uncased BERT model.")
        self.vocabulary = vocabulary
        self.tokenizer = BertTokenizer(vocab=dict(vocabulary), do_lower_case=True)
        self.pad, self.unk, self.cls, self.sep, self.mask = (vocabulary[token] for token in SPECIALS)

    def __len__(self) -> int:
        return max(self.vocabulary.values()) + 1

    @classmethod
    def load(cls, name: str) -> "WordPieces":
        """A published vocabulary by name (weights folder, cache or network), a vocab.txt, or a folder that holds one."""
        path = find_weights(name)
        if path is not None and path.is_dir():
            path = path / "vocab.txt"
        if path is None and name in PUBLISHED:
            path = find_weights(f"{name}-vocab.txt") or hub_file(PUBLISHED[name], "vocab.txt")
        if path is None or not path.is_file():
            source = f"https://huggingface.co/{PUBLISHED.get(name, name)}/resolve/main/vocab.txt"
            raise UserError(
                f"encoder_tokenizer: the vocabulary {name!r} is not on this machine and cannot be fetched from it: download {source} and save "
                f"it as {weights_folder() / (name.replace('/', '--') + '-vocab.txt')}, or give its path with --encoder_tokenizer=<path>."
            )
        lines = path.read_text(encoding="utf-8").split("\n")
        return cls({token.rstrip("\r"): i for i, token in enumerate(lines) if token.strip()})

    @classmethod
    def learn(cls, texts: Iterable[str], size: int) -> "WordPieces":
        """A small vocabulary from texts: every character, then the most frequent words (ties in alphabetical order)."""
        from tokenizers import normalizers, pre_tokenizers

        normalizer = normalizers.BertNormalizer(lowercase=True)
        splitter = pre_tokenizers.BertPreTokenizer()
        counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
        characters = sorted({c for word in counts for c in word})
        pieces = [*SPECIALS, *characters, *(f"##{c}" for c in characters)]
        words = [w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if len(w) > 1]
        if len(pieces) > size:
            raise UserError(
                f"encoder_vocab_size: the texts hold {len(characters)} different characters and need {len(pieces)}, got {size}."
            )
        return cls({piece: i for i, piece in enumerate([*pieces, *words[: size - len(pieces)]])})

    def __call__(self, texts: list[str], length: int) -> Tensor:
        """Ids [B, length] with [CLS] first and [SEP] last; longer texts are cut."""
        return self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]

    def continues(self, size: int) -> Tensor:
        """Marks the word pieces that continue a word, bool [size]."""
        marks = torch.zeros(size, dtype=torch.bool)
        marks[[i for token, i in self.vocabulary.items() if token.startswith("##")]] = True
        return marks

    def save(self, path: Path) -> None:
        by_id = {i: token for token, i in self.vocabulary.items()}
        write_text(path, "".join(f"{by_id.get(i, f'[unused{i}]')}\n" for i in range(len(self))))


def trim_padding(ids: Tensor, pad: int) -> Tensor:
    """Cut the columns that are padding in every row."""
    return ids[:, : max(int((ids != pad).sum(dim=1).max()), 1)]
