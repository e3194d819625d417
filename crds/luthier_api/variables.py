"""What a pod of the trainer image is told beside its run config: the names of environment variables.

They stand alone, because PID 1 also reports an environment in which the types of the run config cannot be imported.
"""

from __future__ import annotations


class Variables:
    """Environment variables of the trainer image. Everything else it needs is in the run config."""

    RUN = "LUTHIER_RUN"
    """Path of the run config; --run overrides it."""
    NODE_RANK = "LUTHIER_NODE_RANK"
    """Index of this pod: node rank, or shard."""
    RUN_DIR = "LUTHIER_RUN_DIR"
    """Writable folder of one pod: stop flag, heartbeat, results of the ranks. Default /run/luthier."""
    TERMINATION_LOG = "LUTHIER_TERMINATION_LOG"
    """Where the termination message goes. Default /dev/termination-log."""
    TOKEN = "HF_TOKEN"
    """Token of the Hub; in `prepare` and `publish` only."""
    METADATA_IDENTITY = "LUTHIER_METADATA_IDENTITY"
    """true: `prepare` may read object stores with the identity that the cloud's metadata service hands out. It is that
    of the node where pods have none of their own, so only the administrator can set it.
    """
