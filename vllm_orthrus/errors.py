"""The errors that a user can act on."""


class UserError(ValueError):
    """The message is the whole story: which setting or file, what it holds, what is allowed, and what to do next."""
