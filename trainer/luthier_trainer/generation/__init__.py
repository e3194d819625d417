"""The parts of `generate`: the table of samplers, one engine a task, and the shard's ledger. Importing this package
imports no torch.
"""
