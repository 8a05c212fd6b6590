"""Name settings by what distinguishes their configurations.

Each setting has a full name and a short one that fits into a table or a figure.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain, takewhile
from typing import Any, NamedTuple

from kd.core.execution import EXECUTION_KEYS
from kd.core.settings import flatten, is_under

MAX_LABEL = 40  # characters of a setting's short name
MAX_VALUE = 16  # characters of a value, in a name that would otherwise be too long
MAX_WORD = 10  # truncation removes a word completely if it has fewer characters than this
MISALIGNED = " MISALIGNED"  # appended to a method that is run with misaligned teacher outputs

SEED_KEYS = ("seed", "teacher.seed", "data.split_seed")  # runs of a setting differ in these
# Keys that do not distinguish settings; teacher.outputs is part of the method's name
IGNORED = (*EXECUTION_KEYS, *SEED_KEYS, "teacher.outputs")
PARTS = "method.parts"  # the list of methods that the method `sum` adds up


class Names(NamedTuple):
    """The short and the full name of each job's setting, and the dotted keys that are swept."""

    short: list[str]
    full: list[str]
    swept: list[str]


def make_labels(jobs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return each job's short name, of at most `MAX_LABEL` characters, and the swept keys."""
    names = describe(jobs)
    return names.short, names.swept


def describe(jobs: Sequence[Mapping[str, Any]]) -> Names:
    """Name each job's setting.

    A key is part of a name if it differs between runs that make the same choices: `method.T` if it
    differs between two runs of `logits`, but not if it differs only between `logits` and `feature`,
    which the method's name distinguishes already. Data sets are compared by their content, not by
    their path. Two settings with different full names have different short names.
    """
    flats = _flattened(jobs)
    differing = _differing(flats)
    differing_keys = {entry[0] for entry in differing}
    keys = dict.fromkeys(chain.from_iterable(flats))
    swept = [key for key in keys if key != "method.name" and key in differing_keys]
    own_keys = [_own_keys(flat, swept, differing) for flat in flats]
    methods = [method_name(job) for job in jobs]

    def join(
        prefixes: Sequence[str],
        keys_by_job: Sequence[Sequence[str]],
        format_key: Callable[[str], str],
        format_value: Callable[[str, Any], str],
    ) -> list[str]:
        names = []
        for prefix, keys, flat in zip(prefixes, keys_by_job, flats, strict=True):
            terms = [f"{format_key(key)}={format_value(key, flat[key])}" for key in keys]
            names.append(" ".join([prefix, *terms]))
        return names

    to_text: Callable[[Any], str] = _short_text
    full = join(methods, own_keys, _key, lambda _, value: to_text(value))
    exact = join(methods, own_keys, _key, lambda _, value: str(value))
    if len(set(full)) != len(set(exact)):
        to_text = str
        full = exact
    sums = _sum_labels(jobs, own_keys)
    prefixes = [
        f"{method}: {label}" if label else method
        for method, label in zip(methods, sums, strict=True)
    ]
    other_keys = [
        _without_parts(keys) if label else keys for keys, label in zip(own_keys, sums, strict=True)
    ]
    short = join(prefixes, other_keys, _key, lambda _, value: to_text(value))
    if any(len(name) > MAX_LABEL for name in short):
        last_words = _last_words(swept)
        values = _short_values(flats, own_keys, to_text)
        short = join(
            prefixes,
            other_keys,
            last_words.__getitem__,
            lambda key, value: values[key, to_text(value)],
        )
    return Names(_make_distinct([one_line(name) for name in short], full), full, swept)


def _own_keys(
    flat: Mapping[str, Any], swept: Sequence[str], differing: Collection[tuple[Any, ...]]
) -> list[str]:
    """Return the swept keys of a job that differ under the choices it makes."""
    return [key for key in swept if key in flat and (key, *_choices(flat, key)) in differing]


def _without_parts(keys: Sequence[str]) -> list[str]:
    """Return the keys except that of a sum's parts."""
    return [key for key in keys if key != PARTS]


def method_name(job: Mapping[str, Any]) -> str:
    """Return the method's name, marked if its teacher outputs are deliberately misaligned."""
    name = str(job["config"]["method"]["name"])
    teacher = job["config"].get("teacher")
    misaligned = (
        job["taught"] and isinstance(teacher, Mapping) and teacher.get("outputs") == "misaligned"
    )
    return name + MISALIGNED if misaligned else name


def applies(job: Mapping[str, Any], key: str) -> bool:
    """Return whether a key has an effect on a job; keys of the teacher need a teacher."""
    return bool(job["taught"]) or not key.startswith("teacher.")


def _flattened(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each job the dotted keys that can distinguish it, with their values."""
    flats = [
        {
            key: value
            for key, value in flatten(job["config"]).items()
            if applies(job, key) and not is_under(key, IGNORED)
        }
        for job in jobs
    ]
    roots: dict[Any, Any] = {}  # the first path of each content
    for flat, job in zip(flats, jobs, strict=True):
        if "data.root" in flat and job.get("content") is not None:
            flat["data.root"] = roots.setdefault(job["content"], flat["data.root"])
    return flats


def _differing(flats: Sequence[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    """Return (key, *choices) of each key that has several values under the same choices."""
    values_of: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for flat in flats:
        for key, value in flat.items():
            values_of[key, *_choices(flat, key)].add(repr(value))
    return {entry for entry, values in values_of.items() if len(values) > 1}


def _choices(flat: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    """Return the names selected in the groups that contain a key.

    For example (adam,) for optimizer.lr where optimizer.name=adam.
    """
    parts = key.split(".")[:-1]
    groups = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return tuple(flat.get(f"{group}.name") for group in groups if f"{group}.name" != key)


# ---- shorter names


def _key(key: str) -> str:
    """Return a key without its redundant prefix `method.` and suffix `.name`."""
    return key.removeprefix("method.").removesuffix(".name")


def _short_text(value: Any) -> str:
    """Format a value, with four significant digits for floats."""
    return format(value, ".4g") if isinstance(value, float) else str(value)


def _last_words(swept: Sequence[str]) -> dict[str, str]:
    """Return the last word of each key, or the full key where two end in the same word."""
    keys_by_word: dict[str, set[str]] = defaultdict(set)
    for key in swept:
        keys_by_word[_key(key).rpartition(".")[2]].add(key)
    last_words = {key: _key(key).rpartition(".")[2] for key in swept}
    return {
        key: word if len(keys_by_word[word]) == 1 else _key(key) for key, word in last_words.items()
    }


def _short_values(
    flats: Sequence[Mapping[str, Any]],
    own_keys: Sequence[Sequence[str]],
    to_text: Callable[[Any], str],
) -> dict[tuple[str, str], str]:
    """Shorten each value to `MAX_VALUE` characters.

    Leading folders that all long values of a key have in common are removed first.

    Returns:
        (key, text of the value) -> shortened text.
    """
    texts_by_key: dict[str, set[str]] = defaultdict(set)
    for flat, keys in zip(flats, own_keys, strict=True):
        for key in keys:
            texts_by_key[key].add(to_text(flat[key]))
    short_values = {}
    for key, texts in texts_by_key.items():
        prefix = _common_folders([text for text in texts if len(text) > MAX_VALUE])
        for text in texts:
            is_shortened = len(text) > MAX_VALUE and len(prefix) > 2
            short = "…/" + text[len(prefix) :] if is_shortened else text
            short_values[key, text] = _truncate(short, MAX_VALUE)
    return short_values


def _common_folders(paths: Sequence[str]) -> str:
    """Return the leading folders that several paths share, or an empty text."""
    if len(paths) < 2:
        return ""
    levels = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    shared_levels = takewhile(lambda level: len(set(level)) == 1, levels)
    return "".join(f"{level[0]}/" for level in shared_levels)


def _sum_labels(jobs: Sequence[Mapping[str, Any]], own_keys: Sequence[Sequence[str]]) -> list[str]:
    """Describe the parts of each sum, such as `logits + 0.5 attention(p=2)`.

    Jobs that are not distinguished by their parts get an empty text.
    """
    parts_by_job = [
        _parts(job) if PARTS in keys else [] for job, keys in zip(jobs, own_keys, strict=True)
    ]
    values_of: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for parts in parts_by_job:
        names = tuple(part["name"] for part in parts)
        for position, part in enumerate(parts):
            for key, value in part.items():
                values_of[names, position, key].add(repr(value))

    def term(names: tuple[str, ...], position: int, part: Mapping[str, Any]) -> str:
        weight = part.get("weight", 1)
        keys = [
            key
            for key in part
            if key not in ("name", "weight") and len(values_of[names, position, key]) > 1
        ]
        settings = ", ".join(f"{key}={_short_text(part[key])}" for key in keys)
        factor = "" if weight == 1 else f"{_short_text(weight)} "
        return f"{factor}{part['name']}" + (f"({settings})" if keys else "")

    labels = []
    for parts in parts_by_job:
        names = tuple(part["name"] for part in parts)
        terms = [term(names, position, part) for position, part in enumerate(parts)]
        labels.append(" + ".join(terms))
    return labels


def _parts(job: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the methods that a sum adds up, or an empty list if the key holds anything else."""
    parts = job["config"]["method"].get("parts")
    is_valid = isinstance(parts, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("name"), str) for part in parts
    )
    return list(parts) if is_valid else []


def one_line(text: str) -> str:
    """Return the text with each unprintable character replaced by an escape."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def _truncate(text: str, width: int) -> str:
    """Cut a text to at most `width` characters by removing its middle.

    Words of fewer than `MAX_WORD` characters are removed completely rather than cut.
    """
    if len(text) <= width:
        return text
    tail = (width - 1) // 3
    head = text[: width - 1 - tail]
    end = text[len(text) - tail :]
    whole_words, _, cut_word = head.rpartition(" ")
    if whole_words and len(cut_word) < MAX_WORD:
        head = whole_words + " "
    cut_word, _, whole_words = end.partition(" ")
    if whole_words and len(cut_word) < MAX_WORD:
        end = " " + whole_words
    return f"{head}…{end}"


def _make_distinct(names: Sequence[str], full: Sequence[str]) -> list[str]:
    """Cut names to `MAX_LABEL` characters, numbering those that would otherwise coincide.

    Args:
        names: The short name of each job.
        full: The full name of each job; equal full names keep equal short names.
    """
    short_of = {
        full_name: _truncate(name, MAX_LABEL) for name, full_name in zip(names, full, strict=True)
    }
    full_names_of: dict[str, list[str]] = defaultdict(list)
    for full_name, short in short_of.items():
        full_names_of[short].append(full_name)
    taken = {short for short, full_names in full_names_of.items() if len(full_names) == 1}
    name_of = dict(zip(full, names, strict=True))
    for full_names in full_names_of.values():
        if len(full_names) == 1:
            continue
        number = 0
        for full_name in full_names:
            short = ""
            while not short or short in taken:
                number += 1
                suffix = f" #{number}"
                short = f"{_truncate(name_of[full_name], MAX_LABEL - len(suffix))}{suffix}"
            taken.add(short)
            short_of[full_name] = short
    return [short_of[full_name] for full_name in full]
