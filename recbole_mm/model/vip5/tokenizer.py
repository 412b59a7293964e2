"""Tokenizers of VIP5: T5's from a local file, or a small one trained on the texts of the dataset."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from recbole_mm.errors import UserError

MARK = "▁"
PHOTO = "<extra_id_0>"
PAD, EOS, UNKNOWN = 0, 1, 2
_SPECIAL = ["<pad>", "</s>", "<unk>"]


class Pieces:
    """A tokenizer as VIP5 needs it: words to piece ids, and which pieces begin a word.

    Pieces never cross a blank, so a text can be put together from the pieces of its words; the renderer caches them.

    Args:
        tokenizer: a tokenizer of the `tokenizers` library with T5's layout (pad 0, end 1) and the sentinel ``<extra_id_0>``.

    Raises:
        UserError: when the layout is another one.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if vocabulary.get("<pad>") != PAD or vocabulary.get("</s>") != EOS or PHOTO not in vocabulary:
            raise UserError(f"tokenizer: expected T5's layout, <pad> = 0, </s> = 1 and a piece {PHOTO}; this one has another.")
        self.photo = vocabulary[PHOTO]
        self.size = max(vocabulary.values()) + 1
        self.begins = np.zeros(self.size, dtype=bool)
        for piece, number in vocabulary.items():
            self.begins[number] = piece.startswith(MARK) or piece == PHOTO

    def ids(self, text: str) -> np.ndarray:
        """Piece ids of a text, without the end mark. A literal sentinel in the text is taken apart: only the renderer places pictures."""
        text = text.replace("<extra_id_", "< extra_id_")
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def text(self, ids: Iterable[int]) -> str:
        """The text of generated ids: cut at the end mark, special pieces left out."""
        kept = []
        for number in ids:
            if number == EOS:
                break
            if number != PAD:
                kept.append(int(number))
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()


def load_tokenizer(path: str | Path) -> Pieces:
    """T5's tokenizer from ``tokenizer.json``, or from a folder that has it (or ``spiece.model``, with the package sentencepiece).

    Raises:
        UserError: when nothing readable is there.
    """
    path = Path(path)
    file = path if path.is_file() else path / "tokenizer.json"
    if file.is_file() and file.suffix == ".json":
        return Pieces(Tokenizer.from_file(str(file)))
    try:
        from transformers import T5Tokenizer

        return Pieces(T5Tokenizer.from_pretrained(str(path)).backend_tokenizer)
    except Exception as error:
        raise UserError(f"tokenizer: expected tokenizer.json or spiece.model in {path}; reading it failed: {error}") from None


def train_tokenizer(texts: Iterable[str], numbers: Iterable[str], vocabulary: int, whole_numbers: bool = True) -> Pieces:
    """A small tokenizer of T5's kind, learned from `texts`; the same texts give the same tokenizer.

    The pieces are found by byte-pair merging, which is deterministic (the library's Unigram trainer is not in its last digits), and used
    as a Unigram model like T5's. ``user_12`` and ``item_12`` are read as two words, so that a number is one piece wherever it stands.

    Args:
        texts: what the pieces are learned from.
        numbers: user and item numbers; with `whole_numbers` each is one piece, else its digits are.
        vocabulary: largest number of learned pieces.
        whole_numbers: see `numbers`.
    """
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always", split=True)]
    )
    apart = normalizers.Replace(Regex("_(?=[0-9])"), " ")
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer, learner.pre_tokenizer = apart, split
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=_SPECIAL, show_progress=False, max_token_length=24)
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]["vocab"]
    # single characters first (BPE numbers them so), then merges in order of frequency: longer pieces must still win over their parts
    pieces = [(piece, 0.0) for piece in _SPECIAL]
    known = set(_SPECIAL)
    for piece, rank in sorted(learned.items(), key=lambda pair: pair[1]):
        if piece not in known:
            pieces.append((piece, -10.0 if len(piece) == 1 else -math.log(rank + 2.0)))
            known.add(piece)
    characters = MARK + "0123456789"
    pieces += [(c, -10.0) for c in characters if c not in known]
    known.update(characters)
    if whole_numbers:
        pieces += [(MARK + n, 0.0) for n in dict.fromkeys(numbers) if MARK + n not in known]
    pieces.append((PHOTO, 0.0))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN, byte_fallback=False))
    tokenizer.normalizer, tokenizer.pre_tokenizer = apart, split
    tokenizer.decoder = decoders.Metaspace(replacement=MARK, prepend_scheme="always", split=True)
    tokenizer.add_special_tokens([PHOTO, *_SPECIAL])
    return Pieces(tokenizer)
