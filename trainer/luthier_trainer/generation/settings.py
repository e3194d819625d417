"""What outputs depend on besides their row, as their lines and files say it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.run import GenerateRun, PreparedRecord
from luthier_trainer.workspace.manifest import sha256

if TYPE_CHECKING:
    from luthier_trainer.generation.hardware import Hardware

WITHOUT_EFFECT = {"perPrompt", "offload"}
"""Settings that change no output: how many there are, and where weights wait."""


def settings(run: GenerateRun, record: PreparedRecord, hardware: Hardware, batch_size: int) -> dict[str, Any]:
    """Return everything that outputs depend on, besides their row.

    With these settings an output can be made again, and outputs made with other settings are recognised as stale.
    """
    spec = run.spec
    adapters = [
        {
            **source.dump(),
            "weight": adapter.weight,
            "sha256": digest(path),
        }
        for source, adapter, path in zip(record.adapters, spec.adapters, record.adapter_paths, strict=True)
    ]
    return {
        "task": spec.task,
        "model": record.model.dump(),
        "adapters": adapters,
        **({"refinerModel": record.refiner.dump()} if record.refiner else {}),
        **({"safetyModel": record.safety.dump()} if record.safety else {}),
        **({"quantization": spec.model.quantization.type} if spec.model.quantization else {}),
        "precision": hardware.precision,
        "batchSize": batch_size,
        **{name: value for name, value in spec.settings.dump().items() if name not in WITHOUT_EFFECT},
    }


def digest(adapter: str) -> str:
    """Return the SHA-256 of an adapter's weights, which changes if it is trained again under the same path."""
    if Path(adapter).is_file():
        return sha256(Path(adapter))
    return next((sha256(p) for suffix in ("safetensors", "bin") for p in sorted(Path(adapter).glob(f"*.{suffix}"))), "")
