"""Models, and what is done with them as they are: loading, reading activations, generating; may import core, data."""
