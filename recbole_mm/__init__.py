"""Multimodal recommendation for RecBole."""

from recbole_mm import compat

compat.apply()

__version__ = "0.1.0"
