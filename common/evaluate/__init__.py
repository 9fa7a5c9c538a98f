"""Evaluation of an encoder: fine-tuning (also from scratch), shuffle test, linear probes, logistic regression, k-NN, location probe."""

from common.evaluate.encoder import TokenEncoder, as_encoder, patch_size
from common.evaluate.finetune import Classifier, Supervision, accuracies, accuracy, best_five, own_metrics, pool_tokens, position_parameters
from common.evaluate.frozen import features, knn_accuracy, layers_name, logistic_accuracy
from common.evaluate.location import LocationProbe
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
    "LocationProbe",
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
    "patch_size",
    "pool_tokens",
    "position_parameters",
]
