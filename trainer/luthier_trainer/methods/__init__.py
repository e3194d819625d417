"""The methods of fine-tuning as data for transformers and PEFT."""
