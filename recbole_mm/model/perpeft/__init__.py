"""PerPEFT-SASRec: SASRec on items encoded by a CLIP with one adapter per group of users."""

from recbole_mm.model.perpeft.model import PerPEFTSASRec

__all__ = ["PerPEFTSASRec"]
