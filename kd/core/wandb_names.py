"""Which names W&B accepts for projects, entities, groups, runs and tags.

W&B checks most of them when a run starts or is synced, by which time a long training may be over.
kd checks them before the first epoch, and shortens the names that it makes itself.
"""

from typing import Annotated, NamedTuple

from pydantic import AfterValidator

from kd.core.errors import UserError
from kd.core.settings import Text


class Rule(NamedTuple):
    """The maximum length of a name that W&B accepts, and the characters that it refuses."""

    longest: int
    refused: str = ""


RULES = {
    "project": Rule(128, "/\\#?%:"),
    "entity": Rule(128, "/\\#?%: "),
    "group": Rule(128),
    "name": Rule(128),
    "id": Rule(128, ":;,#?/'"),
    "job_type": Rule(64),
    "tag": Rule(64),
    "artifact": Rule(128, "/:"),
}


def validate_name(kind: str, name: str) -> str:
    """Return `name` if W&B accepts it.

    Args:
        kind: What is named, a key of `RULES`.
        name: The name to check.

    Raises:
        ValueError: If W&B would refuse the name; the message states what is allowed.
    """
    rule = RULES[kind]
    got = repr(name) if len(name) <= 150 else f"{name[:60]!r}... of {len(name)} characters"
    if not 1 <= len(name) <= rule.longest:
        raise ValueError(f"should have 1 to {rule.longest} characters for W&B, got {got}")
    if name != name.strip() or not name.isprintable():
        raise ValueError(
            f"should be printable, without leading or trailing spaces, for W&B, got {got}"
        )
    if wrong := sorted(set(name) & set(rule.refused)):
        refused = rule.refused.replace(" ", "") + (" or spaces" if " " in rule.refused else "")
        raise ValueError(f"should have none of {refused} for W&B, got {wrong[0]!r} in {got}")
    return name


def check_name(kind: str, name: str, key: str) -> str:
    """Return `name` if W&B accepts it, for a name that is not in the configuration.

    Args:
        kind: What is named, a key of `RULES`.
        name: The name to check.
        key: Where the name comes from, for the error message, such as an environment variable.

    Raises:
        UserError: If W&B would refuse the name; the message begins with `key`.
    """
    try:
        return validate_name(kind, name)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def shorten_name(kind: str, name: str) -> str:
    """Return a name made by kd in a form that W&B accepts.

    Refused characters become `_`. A long name keeps its beginning and its end: the end is what
    distinguishes it.
    """
    rule = RULES[kind]
    characters = (c if c.isprintable() and c not in rule.refused else "_" for c in name)
    name = "".join(characters).strip() or "_"
    if len(name) <= rule.longest:
        return name
    end = rule.longest // 2
    return f"{name[: rule.longest - end - 2].rstrip()}..{name[-end:].lstrip()}"


Project = Annotated[Text, AfterValidator(lambda name: validate_name("project", name))]
Entity = Annotated[Text, AfterValidator(lambda name: validate_name("entity", name))]
Group = Annotated[Text, AfterValidator(lambda name: validate_name("group", name))]
Tag = Annotated[Text, AfterValidator(lambda name: validate_name("tag", name))]
