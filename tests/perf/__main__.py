"""`make bench`: every benchmark, as one JSON document. Names on the command line choose some of them."""

from __future__ import annotations

import importlib
import json
import sys

BENCHMARKS = (
    "training",
    "padding",
    "packing",
    "loss",
    "datareport",
    "jobs",
    "writes",
    "memory",
    "loading",
    "startup",
    "tokenizing",
    "images",
    "texts",
    "rows",
    "reading",
)
CHECKS = ("exactness", "bursts", "survival")  # only by name: they measure nothing


def main() -> None:
    chosen = sys.argv[1:] or list(BENCHMARKS)
    if unknown := set(chosen) - {*BENCHMARKS, *CHECKS}:
        raise SystemExit(f"no such benchmark: {', '.join(unknown)} (there are {', '.join(BENCHMARKS + CHECKS)})")
    print(json.dumps({name: importlib.import_module(f"perf.{name}").main() for name in chosen}, indent=1))


if __name__ == "__main__":
    main()
