"""Multimodal recommendation for RecBole."""

from recbole_mm import compat

compat.apply()
