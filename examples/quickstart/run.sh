#!/usr/bin/env bash
# The quickstart from text to samples: what `make demo` runs. Arguments go to `luthier run`, for example --fresh.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"

python examples/quickstart/data.py luthier-runs/data
exec luthier run examples/quickstart/{1-base,2-adapter,3-generate}.yaml --mount /data=luthier-runs/data --workspace luthier-runs "$@"
