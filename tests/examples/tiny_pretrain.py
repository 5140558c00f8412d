"""`pretrain` with a model small enough for tests of whole processes."""

import sys

from examples.llama.config import MODELS, LlamaConfig
from examples.llama.pretrain import main

TINY = LlamaConfig(256, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2)

if __name__ == "__main__":
    MODELS["nano"] = TINY
    sys.exit(main())
