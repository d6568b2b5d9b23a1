"""The suites by name."""

from __future__ import annotations

from terselm.evaluate import bbh, documents, gsm8k, own
from terselm.evaluate.items import Suite
from terselm.evaluate.settings import SuiteName, SuiteSettings

_LOADERS = {
    SuiteName.GSM8K: gsm8k.load,
    SuiteName.BBH: bbh.load,
    SuiteName.NQ: documents.load_nq,
    SuiteName.SHAREGPT: documents.load_sharegpt,
    SuiteName.ARXIV: documents.load_arxiv,
    SuiteName.PROMPTS: own.load,
}


def load_suite(settings: SuiteSettings) -> Suite:
    """Read the questions of a suite.

    Raises:
        ConfigError, DataFormatError: the data is missing or of another form.
    """
    return _LOADERS[settings.name](settings)
