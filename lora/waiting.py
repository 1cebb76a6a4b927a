"""
How long threads spin while they wait for each other: import this before torch, which reads it once.

A product of matrices is split over OpenMP's threads, and those that are done first spin until the
last one is. libgomp spins 300,000 turns before it sleeps: where another program holds a core, the
thread that has work waits for the one that spins. Three thousand turns cost nothing on a quiet
machine and leave the core to others on a busy one (benchmarks/waiting.py, docs/LOG.md). What you
set yourself, GOMP_SPINCOUNT or OMP_WAIT_POLICY, stays. The numbers computed are the same.
"""

import os

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"
