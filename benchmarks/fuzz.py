"""How do the readers of files from elsewhere take a million hostile inputs?

    python benchmarks/fuzz.py --seconds 60 --target results --target manifest     random damage to sound files
    python benchmarks/fuzz.py --atheris results -runs=100000                      guided by coverage

With `--atheris` (pip install atheris) one target is run, and the rest of the line goes to libFuzzer. An input
that raises anything but the target's documented errors is written to `fuzz-<target>.bin`; the status is 1.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def by_chance(names: list[str], seconds: float, seed: int) -> dict[str, int]:
    """Inputs given to each target in its share of the time; stops at the first finding."""
    from tests.fuzz import targets
    from tests.fuzz.mutate import mutate

    counts = {}
    for name in names or list(targets.TARGETS):
        chance, seeds, count = random.Random(f"{name} {seed}"), targets.seeds(name), 0
        end = time.monotonic() + seconds / len(names or targets.TARGETS)
        while time.monotonic() < end:
            for _ in range(50):
                data = mutate(chance.choice(seeds), chance)
                count += 1
                try:
                    targets.TARGETS[name](data)
                except Exception:
                    Path(f"fuzz-{name}.bin").write_bytes(data)
                    print(f"{name}: input {count} is in fuzz-{name}.bin")
                    traceback.print_exc()
                    sys.exit(1)
        counts[name] = count
        print(f"{name}: {count} inputs, no finding", flush=True)
    return counts


def by_coverage(name: str, flags: list[str]) -> None:
    """LibFuzzer on one target."""
    import atheris

    with atheris.instrument_imports(
        include=["hf_kd.results", "hf_kd.teachers.cache", "hf_kd.whole", "hf_kd.config"]
    ):
        from tests.fuzz import targets
    corpus = targets.FOLDER / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(targets.seeds(name)):
        (corpus / str(i)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *flags, str(corpus)], targets.TARGETS[name])
    atheris.Fuzz()


def main() -> None:
    """Fuzz and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--atheris")
    args, flags = parser.parse_known_args()
    if args.atheris:
        by_coverage(args.atheris, flags)
        return
    counts = by_chance(args.target, args.seconds, args.seed)
    print(f"{sum(counts.values())} inputs in all")
    if args.out:
        args.out.write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
