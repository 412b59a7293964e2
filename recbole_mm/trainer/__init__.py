"""Trainers. :func:`trainer_class_for` says which one a model gets."""

from recbole_mm.trainer.trainer import Trainer, trainer_class_for

__all__ = ["Trainer", "trainer_class_for"]
