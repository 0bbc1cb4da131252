"""Measurements that need a run's weights, beside what every run measures by itself."""
