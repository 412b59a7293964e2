"""BLEU and ROUGE, on texts small enough to work out by hand."""

import math

import pytest

from recbole_mm.evaluator.text import corpus_bleu, rouge_l, rouge_n, share_with_word, text_metrics


def test_perfect_texts_score_hundred():
    texts = ["the lamp is very nice indeed", "a red mug for the office"]
    result = text_metrics(texts, texts)
    assert all(value == pytest.approx(100, abs=1e-3) for value in result.values())
    assert set(result) == {f"{n}{e}" for n in ("bleu4", "rouge1", "rouge2", "rougel") for e in ("", "_published")}


def test_published_bleu_by_hand():
    """6 words against 7: matches 5/6, 4/5, 3/4, 2/3 of 1- to 4-grams, penalty exp(1 - 7/6)."""
    text, reference = "the cat sat on the rug", "the cat sat on the mat today"
    wanted = (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25 * math.exp(1 - 7 / 6)
    assert corpus_bleu([text], [reference]) == pytest.approx(wanted)
    assert corpus_bleu(["a b c"], ["a b c"]) == 0  # no 4-gram, no smoothing


def test_published_rouge_by_hand():
    # sets: {a, b, c} against {a, b, d, e}; a repeated word counts once
    assert rouge_n("a b b c", "a b d e", 1) == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    # longest common subsequence a b d: r = 3/4, p = 3/5, beta = p / r = 0.8
    assert rouge_l("a x b y d", "a b c d") == pytest.approx((1 + 0.64) * 0.75 * 0.6 / (0.75 + 0.64 * 0.6))
    assert rouge_l("x", "a b") == 0


def test_feature_words_are_whole_words():
    assert share_with_word(["the Red lamp", "a redder one", "no"], ["red", "red", ""]) == 50
