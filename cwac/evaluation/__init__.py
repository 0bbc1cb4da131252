"""Generates answers to files, then scores and judges the files, and measures drift; may import core to methods."""
