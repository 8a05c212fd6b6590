"""Open the storage of an Optuna study: a database or a journal file."""

import time
from pathlib import Path
from typing import Any

# At a database whose tables another process is creating at the same time
MAX_OPEN_ATTEMPTS = 10


def open_storage(storage: str, **settings: Any) -> Any:
    """Open an Optuna storage.

    Args:
        storage: A database URL, or the path of a file that ends in .journal.
        settings: Further arguments of `optuna.storages.RDBStorage`.

    Raises:
        Exception: Whatever Optuna, SQLAlchemy or the database driver raise.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if storage.endswith(".journal"):
        return optuna.storages.JournalStorage(JournalFileBackend(storage))
    engine_arguments = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}
    for attempts_left in reversed(range(MAX_OPEN_ATTEMPTS)):
        try:
            return optuna.storages.RDBStorage(storage, engine_kwargs=engine_arguments, **settings)
        except Exception as error:
            conflicts = ("already exists", "unique", "duplicate")
            if not attempts_left or not any(text in str(error).lower() for text in conflicts):
                raise
            time.sleep(0.1)  # another process is creating the tables
    raise AssertionError


def absolute(storage: str) -> str:
    """Return the storage with an absolute path, so that it is valid in any working directory."""
    sqlite = storage.startswith("sqlite:///")
    if not sqlite and not storage.endswith(".journal"):
        return storage
    path = Path(storage.removeprefix("sqlite:///")).expanduser().absolute()
    return f"sqlite:///{path}" if sqlite else str(path)
