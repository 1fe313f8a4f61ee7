"""The one exception type a user of vlattn sees for bad input."""


class InputError(ValueError):
    """Bad input: the message is one line that names the argument, what was given, and what to do."""
