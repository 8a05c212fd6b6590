"""What W&B accepts as the names of projects, entities, groups, runs and tags.

W&B checks most of them when a run starts or is synced: a long training may be over by then. kd checks them before the
first epoch, and shortens the names that it makes itself.
"""

from typing import Annotated, NamedTuple

from pydantic import AfterValidator

from kd.core.errors import UserError
from kd.core.settings import Text


class Rule(NamedTuple):
    """The longest name that W&B accepts, and the characters that it refuses."""

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
    """Return `name` if W&B accepts it as a `kind` of RULES. **Raises:** ValueError that says what is allowed."""
    rule = RULES[kind]
    got = repr(name) if len(name) <= 150 else f"{name[:60]!r}... of {len(name)} characters"
    if not 1 <= len(name) <= rule.longest:
        raise ValueError(f"should have 1 to {rule.longest} characters for W&B, got {got}")
    if name != name.strip() or not name.isprintable():
        raise ValueError(f"should be printable, without space at either end, for W&B, got {got}")
    if wrong := sorted(set(name) & set(rule.refused)):
        refused = rule.refused.replace(" ", "") + (" or spaces" if " " in rule.refused else "")
        raise ValueError(f"should have none of {refused} for W&B, got {wrong[0]!r} in {got}")
    return name


def name_type(kind: str, name: str, key: str) -> str:
    """`valid` for a value that is not in the configuration. **Raises:** UserError that names `key`."""
    try:
        return validate_name(kind, name)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def shorten_name(kind: str, name: str) -> str:
    """Make a name of kd's own fit: keep its beginning and its end, which holds what distinguishes it."""
    longest = RULES[kind].longest
    name = (
        "".join(
            c if c.isprintable() and c not in RULES[kind].refused else "_" for c in name
        ).strip()
        or "_"
    )
    if len(name) <= longest:
        return name
    end = longest // 2
    return f"{name[: longest - end - 2].rstrip()}..{name[-end:].lstrip()}"


Project = Annotated[Text, AfterValidator(lambda name: validate_name("project", name))]
Entity = Annotated[Text, AfterValidator(lambda name: validate_name("entity", name))]
Group = Annotated[Text, AfterValidator(lambda name: validate_name("group", name))]
Tag = Annotated[Text, AfterValidator(lambda name: validate_name("tag", name))]
