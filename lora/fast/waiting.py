"""
What libgomp and oneDNN read once, when torch is loaded: import this before torch.

Waiting. A product of matrices is split over OpenMP's threads, and threads that finish first spin
until the last one does. libgomp spins 300,000 turns before it sleeps: where another program holds
a core, the thread that has work waits for the one that spins. 1,000 turns cost little on a quiet
machine and leave the core to others on a busy one (benchmarks/waiting.py).

Memory. oneDNN and PyTorch's layer over it keep the code they compiled for the last 1,024 shapes of
products, about 30 MB a step in bfloat16, and each step has another number of tokens. The last 64
shapes serve a step as fast. docs/LOG.md has the numbers.

A variable that you set yourself stays. The computed numbers are the same.
"""

import os

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "64")
