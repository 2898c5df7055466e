"""Chest X-rays in, a trained pneumonia classifier and readable results out."""

__version__ = "0.1.0"
