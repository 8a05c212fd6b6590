"""The base of every typed piece of the configuration, and the one error a user's mistake ends in."""

from pydantic import BaseModel, ConfigDict


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line naming the key and what is allowed; exit code 2."""


class Settings(BaseModel):
    """Typed settings: an unknown key, a wrong type, a NaN or an infinity is refused; a value never changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
