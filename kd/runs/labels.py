"""Names of settings: what sets configurations apart, short enough for a table and a figure, and in full."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from kd.core.settings import flatten

MAX_LABEL = 40  # characters of a setting's name
MAX_VALUE = 16  # of a value in one that would be longer
MAX_WORD = 10  # of a word that is left out as a whole
MISALIGNED = " MISALIGNED"  # after the name of a method whose bug was asked for

# keys that set no run apart, or that the method's name tells
IGNORED = (
    "seed",
    "device",
    "threads",
    "rerun",
    "paths.",
    "tracker.",
    "checkpoint.",
    "teacher.outputs",
)
PARTS = "method.parts"  # of the method `sum`: a list of methods


class Names(NamedTuple):
    """For each job the name of its setting, and the same in full; and the dotted keys that are swept."""

    short: list[str]
    full: list[str]
    swept: list[str]


def make_labels(jobs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """(each job's setting in at most `WIDTH` characters, the dotted keys that are swept)."""
    names = describe(jobs)
    return names.short, names.swept


def describe(jobs: Sequence[Mapping[str, Any]]) -> Names:
    """Name each job's setting.

    A key belongs to a setting when it differs between runs of the same choice: `method.T` between two runs of
    `logits`, but not between `logits` and `feature`, where the choice itself says it. Of data the content counts, and
    not where it lies. Two settings with different names in full have different short names.
    """
    flats = _flattened(jobs)
    differs = _differing(flats)
    keys = list(dict.fromkeys(key for flat in flats for key in flat if key != "method.name"))
    swept = [key for key in keys if any(entry[0] == key for entry in differs)]
    own = [
        [key for key in swept if key in flat and (key, *_choices(flat, key)) in differs]
        for flat in flats
    ]
    methods = [method_name(job) for job in jobs]

    def names(
        first: Sequence[str],
        keys: Sequence[Sequence[str]],
        word: Callable[[str], str],
        value: Callable[[str, Any], str],
    ) -> list[str]:
        settings = zip(first, keys, flats, strict=True)
        return [
            " ".join([start, *(f"{word(k)}={value(k, flat[k])}" for k in some)])
            for start, some, flat in settings
        ]

    text: Callable[[Any], str] = _short_text
    full = names(methods, own, _key, lambda _, value: text(value))
    exact = names(methods, own, _key, lambda _, value: str(value))
    if len(set(full)) != len(set(exact)):
        text, full = str, exact
    sums = _sum_labels(jobs, own)
    first = [
        f"{method}: {total}" if total else method
        for method, total in zip(methods, sums, strict=True)
    ]
    rest = [
        [key for key in some if not (total and key == PARTS)]
        for some, total in zip(own, sums, strict=True)
    ]
    short = names(first, rest, _key, lambda _, value: text(value))
    if any(len(name) > MAX_LABEL for name in short):
        words, values = _last_words(swept), _short_values(flats, own, text)
        short = names(first, rest, words.__getitem__, lambda key, value: values[key, text(value)])
    return Names(_make_distinct([one_line(name) for name in short], full), full, swept)


def method_name(job: Mapping[str, Any]) -> str:
    """The method's name, with a mark where its bug was asked for."""
    name, teacher = str(job["config"]["method"]["name"]), job["config"].get("teacher")
    misaligned = (
        job["taught"] and isinstance(teacher, Mapping) and teacher.get("outputs") == "misaligned"
    )
    return name + MISALIGNED if misaligned else name


def applies(job: Mapping[str, Any], key: str) -> bool:
    """Whether a key has an effect on a job: the teacher's have none where there is no teacher."""
    return bool(job["taught"]) or not key.startswith("teacher.")


def _flattened(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The keys of each job that can set it apart."""
    flats = [
        {
            k: v
            for k, v in flatten(job["config"]).items()
            if applies(job, k) and not k.startswith(IGNORED)
        }
        for job in jobs
    ]
    roots: dict[Any, Any] = {}  # of each content the first
    for flat, job in zip(flats, jobs, strict=True):
        if "data.root" in flat and job.get("content") is not None:
            flat["data.root"] = roots.setdefault(job["content"], flat["data.root"])
    return flats


def _differing(flats: Sequence[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    """(key, the choices that it stands in) of those that have several values."""
    seen: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for flat in flats:
        for key, value in flat.items():
            seen[key, *_choices(flat, key)].add(repr(value))
    return {entry for entry, values in seen.items() if len(values) > 1}


def _choices(flat: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    """The names of the groups that a key stands in: (adam,) for optimizer.lr under optimizer.name=adam."""
    parts = key.split(".")[:-1]
    groups = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return tuple(flat.get(f"{group}.name") for group in groups if f"{group}.name" != key)


# ---- shorter


def _key(key: str) -> str:
    return key.removeprefix("method.").removesuffix(".name")


def _short_text(value: Any) -> str:
    return format(value, ".4g") if isinstance(value, float) else str(value)


def _last_words(swept: Sequence[str]) -> dict[str, str]:
    """The last word of each key, or the whole key where two end in the same word."""
    ends: dict[str, set[str]] = defaultdict(set)
    for key in swept:
        ends[_key(key).rpartition(".")[2]].add(key)
    words = {key: _key(key).rpartition(".")[2] for key in swept}
    return {key: word if len(ends[word]) == 1 else _key(key) for key, word in words.items()}


def _short_values(
    flats: Sequence[Mapping[str, Any]], own: Sequence[Sequence[str]], text: Callable[[Any], str]
) -> dict[tuple[str, str], str]:
    """(key, value) -> the value in `VALUE` characters, without the folders that a key's long values share."""
    values: dict[str, set[str]] = defaultdict(set)
    for flat, keys in zip(flats, own, strict=True):
        for key in keys:
            values[key].add(text(flat[key]))
    found = {}
    for key, texts in values.items():
        long = [value for value in texts if len(value) > MAX_VALUE]
        levels = (
            zip(*(value.split("/")[:-1] for value in long), strict=False) if len(long) > 1 else ()
        )
        start = "".join(
            f"{level[0]}/" for level in takewhile(lambda level: len(set(level)) == 1, levels)
        )
        for value in texts:
            short = (
                "…/" + value[len(start) :] if len(value) > MAX_VALUE and len(start) > 2 else value
            )
            found[key, value] = _truncate(short, MAX_VALUE)
    return found


def _sum_labels(jobs: Sequence[Mapping[str, Any]], own: Sequence[Sequence[str]]) -> list[str]:
    """For each job that the parts of its sum set apart, those as `logits + 0.5 attention(p=2)`; "" for any other."""
    parts = [_parts(job) if PARTS in keys else [] for job, keys in zip(jobs, own, strict=True)]
    seen: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for some in parts:
        names = tuple(part["name"] for part in some)
        for position, part in enumerate(some):
            for key, value in part.items():
                seen[names, position, key].add(repr(value))

    def term(names: tuple[str, ...], position: int, part: Mapping[str, Any]) -> str:
        weight = part.get("weight", 1)
        keys = [
            key
            for key in part
            if key not in ("name", "weight") and len(seen[names, position, key]) > 1
        ]
        inner = f"({', '.join(f'{key}={_short_text(part[key])}' for key in keys)})" if keys else ""
        return f"{'' if weight == 1 else f'{_short_text(weight)} '}{part['name']}{inner}"

    found = []
    for some in parts:
        names = tuple(part["name"] for part in some)
        found.append(" + ".join(term(names, position, part) for position, part in enumerate(some)))
    return found


def _parts(job: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The methods that a sum adds up; none where that is not what the key holds."""
    parts = job["config"]["method"].get("parts")
    sound = isinstance(parts, list) and all(
        isinstance(p, Mapping) and isinstance(p.get("name"), str) for p in parts
    )
    return list(parts) if sound else []


def one_line(text: str) -> str:
    """`text` with everything that cannot be printed as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _truncate(text: str, width: int) -> str:
    """At most `width` characters: what is too long loses its middle, words as a whole where they are short."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 3
    head, end = text[: width - 1 - tail], text[len(text) - tail :]
    cut, _, part = head.rpartition(" ")
    first, _, rest = end.partition(" ")
    return f"{cut + ' ' if cut and len(part) < MAX_WORD else head}…{' ' + rest if rest and len(first) < MAX_WORD else end}"


def _make_distinct(names: Sequence[str], full: Sequence[str]) -> list[str]:
    """The names cut to `WIDTH`, with a number where two that differ in full would be one."""
    cut = {whole: _truncate(name, MAX_LABEL) for name, whole in zip(names, full, strict=True)}
    alike: dict[str, list[str]] = defaultdict(list)
    for whole, name in cut.items():
        alike[name].append(whole)
    taken = {name for name, several in alike.items() if len(several) == 1}
    name_of = dict(zip(full, names, strict=True))
    for several in alike.values():
        if len(several) == 1:
            continue
        number = 0
        for whole in several:
            name = ""
            while not name or name in taken:
                number += 1
                name = f"{_truncate(name_of[whole], MAX_LABEL - len(f' #{number}'))} #{number}"
            taken.add(name)
            cut[whole] = name
    return [cut[whole] for whole in full]
