"""LoRA by hand: the core, and its rooms fast, base, run, use."""

import sys
from itertools import pairwise

for option, module in pairwise(sys.orig_argv):                 # python -m lora.layer
    if option == "-m" and module.partition(".")[0] == "lora":
        raise SystemExit(f"{module} is no command; python train.py --help shows the first one")
