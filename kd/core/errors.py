"""The errors that kd tells apart, and what it says of them."""

import difflib
from collections.abc import Iterable

# Words for keys that are named by a symbol or an abbreviation
SYNONYMS = {
    "temperature": "T",
    "learning_rate": "lr",
    "epoch": "epochs",
    "checkpoints": "checkpoint",
}


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line naming the key and what is allowed; exit code 2."""


class DivergedError(Exception):
    """A loss term or a weight became NaN or infinite; the text says which, and when."""


class PrunedError(Exception):
    """A search stopped the run: other trials do better."""


class SweepFailedError(Exception):
    """Some jobs of a sweep failed; the report says which."""


class JobFailedError(Exception):
    """A launcher returned the error of a job."""


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def unknown_key(path: str, allowed: Iterable[str]) -> str:
    """Describe an unknown key on one line.

    **Arguments:** `path`: the key, dotted; `allowed`: the keys that its node has.
    **Returns:** the key, the nearest valid one if any is near, and all valid ones.
    """
    node, _, name = path.rpartition(".")
    allowed = list(allowed)
    words = {one.lower(): one for one in allowed}
    words |= {
        long: short for long, short in SYNONYMS.items() if short in allowed and long not in words
    }
    near = difflib.get_close_matches(name.lower(), words, 1)
    hint = f"did you mean {f'{node}.' if node else ''}{words[near[0]]}? Valid" if near else "valid"
    return f"{path}: unknown key; {hint}: {', '.join(allowed)}"
