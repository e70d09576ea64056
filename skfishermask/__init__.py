"""Active learning with FisherMask for scikit-learn, skorch and modAL."""

__version__ = "0.1.0"
