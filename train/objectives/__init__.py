"""What alignment minimises: one small class each, and their weighted sum."""

from terselm.train.objectives.base import Objective
from terselm.train.objectives.divergence import TailedDivergence
from terselm.train.objectives.matching import SurprisalMatching
from terselm.train.objectives.mixture import Mixture
from terselm.train.objectives.nll import NegativeLogLikelihood
from terselm.train.objectives.ranking import KeptWordRanking

__all__ = [
    "KeptWordRanking",
    "Mixture",
    "NegativeLogLikelihood",
    "Objective",
    "SurprisalMatching",
    "TailedDivergence",
]
