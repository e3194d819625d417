"""The folder bears the name of a standard module, so its own modules are found by path and not as a package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
