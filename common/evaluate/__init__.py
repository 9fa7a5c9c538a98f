"""How an encoder is judged: full fine-tuning, linear probe, weighted k-NN. Training from scratch is fine-tuning from nothing."""

from common.evaluate.features import features, knn_accuracy
from common.evaluate.finetune import Classifier, Supervision, accuracy, best_five, own_metrics, pool, position_parameters
from common.evaluate.probe import LinearProbe

__all__ = [
    "Classifier",
    "LinearProbe",
    "Supervision",
    "accuracy",
    "best_five",
    "features",
    "knn_accuracy",
    "own_metrics",
    "pool",
    "position_parameters",
]
