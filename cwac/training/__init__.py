"""A run: its context, its poisoned rows, the trainer with a defence's hooks; may import every other package."""
