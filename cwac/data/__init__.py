"""Text: tasks, harmful pools, their mixing, their tokens, the keyword rule for refusals; may import core."""
