r"""Measures of generated texts: BLEU and ROUGE by their reference packages, and as VIP5's paper computed them.

The published variant is that of TensorFlow-NMT: words are what blanks separate; BLEU-4 over the corpus without smoothing; ROUGE-n on sets
of n-grams, ROUGE-L on the longest common subsequence, both as F. (The released notebook passes raw strings to BLEU, so that its n-grams
are characters; the paper's figures are only possible with words.) All values are percentages.
"""

import math
from collections import Counter
from collections.abc import Sequence

from recbole_mm.errors import UserError


def text_metrics(generated: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """``bleu4``, ``rouge1``, ``rouge2``, ``rougel`` by sacrebleu and rouge-score, and the same with ``_published``; in percent.

    Raises:
        UserError: when the two packages are not installed, or the lists differ in length.
    """
    if len(generated) != len(references):
        raise UserError(f"Expected one reference for each text, got {len(generated)} texts and {len(references)} references.")
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UserError(
            f"Measuring texts needs the packages sacrebleu and rouge-score ({error}): pip install sacrebleu rouge-score"
        ) from None
    names = ("rouge1", "rouge2", "rougel", "rouge1_published", "rouge2_published", "rougel_published")
    if not generated:
        return dict.fromkeys(("bleu4", "bleu4_published", *names), 0.0)
    result = {
        "bleu4": sacrebleu.corpus_bleu(list(generated), [list(references)]).score,
        "bleu4_published": 100 * corpus_bleu(generated, references),
    }
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    sums = Counter()
    for text, reference in zip(generated, references):
        for name, score in scorer.score(reference, text).items():
            sums[name.lower()] += score.fmeasure
        sums["rouge1_published"] += rouge_n(text, reference, 1)
        sums["rouge2_published"] += rouge_n(text, reference, 2)
        sums["rougel_published"] += rouge_l(text, reference)
    return {**result, **{name: 100 * sums[name] / len(generated) for name in names}}


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def corpus_bleu(generated: Sequence[str], references: Sequence[str], order: int = 4) -> float:
    """BLEU of a corpus with one reference each: clipped matches summed over the corpus, geometric mean, brevity penalty; 0 without a match of some order."""
    matches, possible = [0] * order, [0] * order
    length = wanted = 0
    for text, reference in zip(generated, references):
        words, right = text.split(), reference.split()
        length, wanted = length + len(words), wanted + len(right)
        for n in range(1, order + 1):
            have, want = Counter(_grams(words, n)), Counter(_grams(right, n))
            matches[n - 1] += sum((have & want).values())
            possible[n - 1] += max(len(words) - n + 1, 0)
    if not length or not all(matches):
        return 0.0
    mean = math.exp(sum(math.log(m / p) for m, p in zip(matches, possible)) / order)
    return mean * (1.0 if length > wanted else math.exp(1 - wanted / length))


def rouge_n(text: str, reference: str, n: int) -> float:
    """F of the sets of n-grams."""
    have, want = set(_grams(text.split(" "), n)), set(_grams(reference.split(" "), n))
    common = len(have & want)
    precision, recall = (common / len(grams) if grams else 0.0 for grams in (have, want))
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l(text: str, reference: str) -> float:
    """F of the longest common subsequence, with the release's weight :math:`\\beta = p / r`."""
    words, right = text.split(" "), reference.split(" ")
    row = [0] * (len(right) + 1)
    for word in words:
        before = row[:]
        for j, other in enumerate(right):
            row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
    recall, precision = row[-1] / len(right), row[-1] / len(words)
    beta = precision / (recall + 1e-12)
    return (1 + beta**2) * recall * precision / (recall + beta**2 * precision + 1e-12)


def share_with_word(generated: Sequence[str], words: Sequence[str]) -> float:
    """Percentage of texts that contain their word (as a whole word, case ignored); texts without a word to contain do not count."""
    pairs = [(text.lower().split(), word.lower()) for text, word in zip(generated, words) if word]
    return 100 * sum(word in text for text, word in pairs) / len(pairs) if pairs else 0.0
