"""Which data to train on, from the losses of finished runs: docs/curation.md.

`UtilityLaw` predicts the loss of a pool or a mixture (arXiv 2404.07177), `fit` finds it from points, `answer` and
`crossovers` say what is best for a budget and how sure that is. Beside it two laws of repetition alone.
"""

from thriftlab.data.law.choice import (
    Answer,
    Crossover,
    Option,
    answer,
    best_weights,
    calibrated_gamma,
    crossovers,
    mixture_error,
    option,
    predicted,
    prefixes,
    with_gamma,
)
from thriftlab.data.law.fit import Fit, fit
from thriftlab.data.law.grid import GridFit, fit_grid
from thriftlab.data.law.points import Point, before_the_rise
from thriftlab.data.law.scaling import DataConstrainedLaw, OverfittingLaw
from thriftlab.data.law.utility import SAMPLES, Choice, Pool, UtilityLaw

__all__ = [
    "SAMPLES",
    "Answer",
    "Choice",
    "Crossover",
    "DataConstrainedLaw",
    "Fit",
    "GridFit",
    "Option",
    "OverfittingLaw",
    "Point",
    "Pool",
    "UtilityLaw",
    "answer",
    "before_the_rise",
    "best_weights",
    "calibrated_gamma",
    "crossovers",
    "fit",
    "fit_grid",
    "mixture_error",
    "option",
    "predicted",
    "prefixes",
    "with_gamma",
]
