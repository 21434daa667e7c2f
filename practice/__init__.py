"""What using models needs beyond chat.py. Nothing in here is needed to understand a model."""
