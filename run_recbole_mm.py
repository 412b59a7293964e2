"""Train, evaluate, search and compare multimodal recommenders: ``python run_recbole_mm.py --model=VBPR --dataset=shop``; ``--help`` says more."""

from recbole_mm.cli import entry

if __name__ == "__main__":
    entry()
