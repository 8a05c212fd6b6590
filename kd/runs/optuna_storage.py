"""The storage of an Optuna study: a database, or a journal file."""

import time
from pathlib import Path
from typing import Any

TABLES = (
    10  # how often to try to open a database whose tables another process makes at the same moment
)


def open_storage(place: str, **settings: Any) -> Any:
    """Optuna's storage of that name. **Raises:** whatever Optuna, SQLAlchemy or a database's driver raise."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if place.endswith(".journal"):
        return optuna.storages.JournalStorage(JournalFileBackend(place))
    arguments = {"connect_args": {"timeout": 60}} if place.startswith("sqlite") else {}
    for left in reversed(range(TABLES)):
        try:
            return optuna.storages.RDBStorage(place, engine_kwargs=arguments, **settings)
        except Exception as error:
            if not left or not any(
                sign in str(error).lower() for sign in ("already exists", "unique", "duplicate")
            ):
                raise
            time.sleep(0.1)  # another process makes the tables at this moment
    raise AssertionError


def absolute(storage: str) -> str:
    """The same storage, named so that any directory understands it."""
    sqlite = storage.startswith("sqlite:///")
    if not sqlite and not storage.endswith(".journal"):
        return storage
    place = Path(storage.removeprefix("sqlite:///")).expanduser().absolute()
    return f"sqlite:///{place}" if sqlite else str(place)
