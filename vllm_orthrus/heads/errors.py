"""What can be wrong with a head."""

from vllm_orthrus.errors import UserError


class HeadError(UserError):
    """A head that cannot be found, read, or used with the base it was asked to serve."""
