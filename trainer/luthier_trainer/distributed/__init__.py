"""How a training is spread over processes: launch, strategy, agreement between the ranks."""
