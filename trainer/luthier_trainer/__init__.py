"""What runs in the pods: `python -m luthier_trainer prepare|train|generate|publish`. Importing this package imports no
torch.
"""
