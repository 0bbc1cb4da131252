"""Tasks, harmful pools, their mixing, and tokenisation."""
