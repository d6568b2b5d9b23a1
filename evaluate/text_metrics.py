"""Likeness of texts, by the libraries that everybody uses.

BLEU: sacrebleu; ROUGE-1/2/L: rouge-score, with stemming; BERTScore: torchmetrics.
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


_PUBLISHED_LAYER = {"roberta-large": 17, "bert-base-uncased": 9, "distilroberta-base": 5}  # that agree best with people
_WINDOW = 512  # tokens; what is beyond is not read


def bert_score(answers: Sequence[str], references: Sequence[str], model: str) -> list[float]:
    """The F1 of BERTScore of each answer, in percent, not rescaled; special tokens do not count.

    Args:
        model: encoder on the hub or in a folder, whose last layer is used; of ``roberta-large`` and others that the
            BERTScore paper (arXiv:1904.09675) examined, the layer that it names.

    Raises:
        ConfigError: torchmetrics is not installed, or the model cannot be had.
    """
    try:
        from torchmetrics.functional.text.bert import bert_score as scores
    except ImportError:
        raise ConfigError("BERTScore needs torchmetrics; run: pip install 'terselm[evaluate]'") from None
    try:
        found = scores(
            list(answers),
            list(references),
            model_name_or_path=model,
            num_layers=_PUBLISHED_LAYER.get(model),
            max_length=_WINDOW,
            truncation=True,
        )
    except OSError as error:
        raise ConfigError(
            f"BERTScore could not get its model {model!r}: {str(error).splitlines()[0]}; name another in bert_score"
        ) from None
    likenesses = found["f1"].reshape(-1).tolist()  # of one text, it is a number
    # Nothing is like an empty answer.
    return [100 * value if answer.strip() else 0.0 for answer, value in zip(answers, likenesses, strict=True)]
