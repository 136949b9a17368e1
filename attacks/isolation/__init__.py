"""A frozen evaluation view of a model that isolates the caller's model from attacks."""

from attacks.isolation.view import Classifier, WeightsError, frozen_view

__all__ = ["Classifier", "WeightsError", "frozen_view"]
