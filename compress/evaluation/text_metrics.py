"""Likeness of texts, by the libraries that everybody uses.

BLEU: sacrebleu; ROUGE-1/2/L: rouge-score, with stemming.
"""

from __future__ import annotations

from collections.abc import Sequence

from terselm.errors import ConfigError


def likeness(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Sentence BLEU and the F-measures of ROUGE-1, 2 and L of each answer, in percent.

    Raises:
        ConfigError: the libraries are not installed.
    """
    try:
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError(
            "comparing texts needs sacrebleu and rouge-score; run: pip install 'terselm[evaluate]'"
        ) from None
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rouge = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {
        "bleu": [
            sacrebleu.sentence_bleu(answer, [reference]).score
            for answer, reference in zip(answers, references, strict=True)
        ],
        **{name: [100 * score[name].fmeasure for score in rouge] for name in ("rouge1", "rouge2", "rougeL")},
    }
