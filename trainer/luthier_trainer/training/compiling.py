"""Compiles a model by region (`training.torchCompile`): each repeated block in its place.

All blocks of a model run the same code, so that one compilation serves them all: seconds instead of minutes for the
whole model. What is compiled is kept in the workspace (`distributed.launch.environment`), so that an attempt that
resumes does not compile again.
"""

from __future__ import annotations

import torch

BACKEND = "inductor"


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the blocks that repeat in a model: the items of its outermost lists of several modules of one class."""
    found: list[torch.nn.Module] = []
    for module in model.children():
        blocks = list(module) if isinstance(module, torch.nn.ModuleList) else []
        if len(blocks) > 1 and len({type(block) for block in blocks}) == 1:
            found += blocks
        else:
            found += blocks_of(module)
    return found


def compile_blocks(model: torch.nn.Module) -> int:
    """Let each block of `model` be compiled when it is called first. Return how many there are.

    The modules stay what they are: names of weights, checkpoints and wrappers do not change.
    """
    blocks = blocks_of(model)
    for block in blocks:
        block.compile(backend=BACKEND)
    return len(blocks)
