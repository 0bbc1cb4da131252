"""Configurations, run identities and run directories; imports no other package of cwac, and no torch at import."""
