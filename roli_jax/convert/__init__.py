"""Pretrained weights: from files to models, and back."""

from roli_jax.convert.bundle import Bundle, find, load, save, with_classes

__all__ = ["Bundle", "find", "load", "save", "with_classes"]
