"""The one place that knows what a configuration means: identity, validation, presets."""


class UserError(Exception):
    """Something the user can mend; its message names the key and the remedy and is printed without a traceback."""
