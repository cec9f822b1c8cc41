"""The two exceptions a user is meant to read. Entry points print them without a traceback."""


class UserError(ValueError):
    """A mistake in the user's input: names the value and the fix, in one line. Nothing was written over."""

    exit_code = 2
    together = False  # whether all processes of the run raise it, see `distributed.together`


class RunError(UserError):
    """The run cannot go on (the loss is not finite, the disk is full): says what is kept and how to continue."""

    exit_code = 1
