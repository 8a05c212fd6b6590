"""Where Optuna keeps a study: a database's URL, or a journal's path. Imported only where a search is."""

from pathlib import Path
from typing import Any


def storage(name: str) -> Any:
    """Optuna's storage of that name. **Raises:** whatever Optuna, SQLAlchemy or a database's driver raise."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if name.endswith(".journal"):
        return optuna.storages.JournalStorage(JournalFileBackend(name))
    arguments = {"connect_args": {"timeout": 60}} if name.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(name, engine_kwargs=arguments)


def absolute(name: str) -> str:
    """The same storage, named so that any directory understands it; its folder is made."""
    head, _, path = name.rpartition("sqlite:///")
    if not name.endswith(".journal") and (head or not name.startswith("sqlite:///")):
        return name
    place = Path(path or name).expanduser().absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{place}" if name.startswith("sqlite:///") else str(place)
