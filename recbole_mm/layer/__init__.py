"""Arithmetic that models share. Nothing in here knows Config, datasets or trainers."""
