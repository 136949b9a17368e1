"""A frozen evaluation view of a model: nothing that an attack does reaches the caller."""

from attacks.isolation.view import Classifier, WeightsError, frozen_view

__all__ = ["Classifier", "WeightsError", "frozen_view"]
