"""A fleet from wherever it is kept: a folder of tables, a history, or the Azure sample."""

from pathlib import Path

from apps.maintenance.azure import FILES as AZURE_FILES
from apps.maintenance.azure import load_fleet
from apps.maintenance.fleet import Fleet
from apps.maintenance.tables import read_fleet
from cluster.errors import ConfigurationError


def read_source(folder: Path) -> Fleet:
    """Return the fleet of a folder, of a live plant's state, or of its history.

    Raises:
        FileNotFoundError: A table is missing.
        ConfigurationError: It is malformed, or holds nothing.
    """
    for history in (folder, folder / "history"):
        if (history / "journal").is_dir():
            from apps.maintenance.telemetry.records import (  # noqa: PLC0415 - DuckDB
                read_history,
            )

            return read_history(history)
    if (folder / AZURE_FILES[0]).is_file():
        return load_fleet(folder)
    try:
        return read_fleet(folder)
    except (KeyError, ValueError) as error:
        message = f"{folder.name}: {error}"
        raise ConfigurationError(message) from error
