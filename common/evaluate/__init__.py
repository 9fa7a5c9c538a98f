"""Evaluation of an encoder: full fine-tuning (also from scratch), linear probes, logistic regression, k-NN."""

from common.evaluate.encoder import TokenEncoder, as_encoder
from common.evaluate.finetune import Classifier, Supervision, accuracies, accuracy, best_five, own_metrics, pool_tokens, position_parameters
from common.evaluate.frozen import features, knn_accuracy, layers_name, logistic_accuracy
from common.evaluate.probe import ON_TEST, FeatureLoader, LinearProbe, can_cache, hold_out
from common.evaluate.protocols import PROTOCOLS, Result, evaluate, labelled_images

__all__ = [
    "ON_TEST",
    "PROTOCOLS",
    "Result",
    "TokenEncoder",
    "as_encoder",
    "evaluate",
    "labelled_images",
    "Classifier",
    "FeatureLoader",
    "LinearProbe",
    "Supervision",
    "accuracies",
    "accuracy",
    "best_five",
    "can_cache",
    "features",
    "hold_out",
    "knn_accuracy",
    "layers_name",
    "logistic_accuracy",
    "own_metrics",
    "pool_tokens",
    "position_parameters",
]
