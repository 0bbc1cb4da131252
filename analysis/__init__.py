"""From finished runs to tables and figures. Reads `metrics.jsonl` files and nothing else of a run's weights."""
