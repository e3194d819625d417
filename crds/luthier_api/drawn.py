"""Writes the files that are drawn from the types: `python -m luthier_api.drawn`. `--check` fails on a difference."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from luthier_api import crd, secrets

TOP = Path(__file__).resolve().parents[2]


def files() -> dict[str, str]:
    """Path from the top of the repository → text."""
    folders = ("crds", "charts/luthier/files/crds")
    crds = {f"{folder}/{name}": text for folder in folders for name, text in crd.render().items()}
    rows = yaml.safe_dump(secrets.chart_values(), sort_keys=False, width=140)
    return crds | {"charts/luthier/files/secrets.yaml": f"# Drawn from luthier_api.secrets; `make generate`.\n{rows}"}


def main(check: bool) -> int:
    """Write, or with `check` compare. Returns the exit code."""
    stale = [name for name, text in files().items() if not (TOP / name).exists() or (TOP / name).read_text() != text]
    if check:
        if stale:
            print(f"not current: {', '.join(stale)}. Run `make generate`.", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (TOP / name).parent.mkdir(parents=True, exist_ok=True)
        (TOP / name).write_text(files()[name])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(check="--check" in sys.argv[1:]))
