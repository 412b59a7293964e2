"""VIP5: multimodal foundation model with sequential, direct and explanation tasks (Findings of EMNLP 2023).

network.py: T5 with adapters and visual tokens; prompts.py, tokenizer.py, samples.py: from data to token ids; search.py: beam search over
the items that exist; dataset.py, model.py: the sides that face RecBole. The training loop is in trainer/vip5.py.
"""

from recbole_mm.model.vip5.model import VIP5

__all__ = ["VIP5"]
