"""Likeness of texts, by the libraries that everybody uses.

BLEU: sacrebleu; ROUGE-1/2/L: rouge-score, with stemming; BERTScore: bert-score, which needs a model from the hub.
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


def bert_score(answers: Sequence[str], references: Sequence[str], model: str = "roberta-large") -> list[float]:
    """The F1 of BERTScore of each answer, in percent.

    Raises:
        ConfigError: bert-score is not installed, or its model cannot be had.
    """
    try:
        from bert_score import score
    except ImportError:
        raise ConfigError("BERTScore needs bert-score and a model from the hub; run: pip install bert-score") from None
    try:
        f1 = score(list(answers), list(references), model_type=model)[2]
    except OSError as error:
        raise ConfigError(f"BERTScore could not get its model {model!r}: {str(error).splitlines()[0]}") from None
    return [100 * float(value) for value in f1]
