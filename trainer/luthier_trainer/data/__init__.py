"""From files or a Hub dataset to rows that a task learns from: `load` → `columns` → `tokens`. Every mistake ends here,
with its field.
"""
