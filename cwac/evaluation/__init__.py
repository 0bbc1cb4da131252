"""Generate once to files, then score and judge from the files."""
