"""Problems: models, data, losses, metrics, targets and budgets, each with its source."""

from .catalog import ACCURACY, LOGIT_ERROR, PIXEL_ERROR, classification, reconstruction, squares
from .models import autoencoder, small_cnn
from .problem import PROBLEMS, Metric, Problem, Target, batches, evaluate, penalised, register, shuffled, steps_of

__all__ = [
    "ACCURACY",
    "LOGIT_ERROR",
    "PIXEL_ERROR",
    "PROBLEMS",
    "Metric",
    "Problem",
    "Target",
    "autoencoder",
    "batches",
    "classification",
    "evaluate",
    "penalised",
    "reconstruction",
    "register",
    "shuffled",
    "small_cnn",
    "squares",
    "steps_of",
]
