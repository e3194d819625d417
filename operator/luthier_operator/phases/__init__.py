"""The steps that `decide` walks: one file each, pure, with what it creates and what the state of its children means."""
