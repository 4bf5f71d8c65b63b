"""Mutants of the files that kvcompress reads, sealed anew, tried until one is not refused cleanly.

    python tools/fuzz.py cache --count 50000 [--seed 7] [--sanitize] [--only NUMBER]

Prints the seed, how the mutants ended and every fault; exits with 1 where there was one. ``--only``
runs one mutant again, in this process, with its traceback. ``--sanitize`` builds the C kernels with
checked indices under AddressSanitizer and UBSan first.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.fuzz import run

# what can be fuzzed: a module of tests.fuzz each, see tests/fuzz/run.py
TARGETS = {"bundle": "bundles", "cache": "caches"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--only", type=int, help="this mutant alone, in this process")
    parser.add_argument("--sanitize", action="store_true")
    given = parser.parse_args()
    target = TARGETS[given.target]
    if given.only is not None:
        with tempfile.TemporaryDirectory() as name:
            trial = run.trial_of(target, Path(name))
            print(trial(random.Random(f"{given.seed}:{given.only}"), Path(name)))
        return 0
    environment = {}
    if given.sanitize:
        from tests.kernels.sanitized import environment as sanitized

        environment = sanitized()
    began = time.monotonic()

    def tell(found: run.Found) -> None:
        took = time.monotonic() - began
        so_far = f"{found.tried} of {given.count}, {len(found.faults)} faults, {took:.0f} s"
        print(so_far, file=sys.stderr, flush=True)

    found = run.run(target, given.count, given.seed, given.first, environment, tell)
    built = ", sanitized" if given.sanitize else ""
    print(f"{given.target}{built}, {time.monotonic() - began:.0f} s, {found.words()}")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
