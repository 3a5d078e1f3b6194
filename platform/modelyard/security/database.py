"""The gateway's database, shared by all its replicas: keys, quotas and what was used of them.

Every transaction takes the write lock when it begins, so that "read, decide, write" is one step for all processes:
`BEGIN IMMEDIATE` in SQLite, `SELECT ... FOR UPDATE` in the statements that need it elsewhere.
"""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sql

from modelyard import config
from modelyard.errors import StorageError

ENV_DATABASE = "MODELYARD_GATEWAY_DB"
"""URL of the gateway's database; default `sqlite:///<home>/gateway.db`."""


def default_url() -> str:
    """`MODELYARD_GATEWAY_DB`, or a SQLite file in the home folder."""
    return os.environ.get(ENV_DATABASE) or f"sqlite:///{config.settings().home / 'gateway.db'}"


def connect(url: str, tables: sql.MetaData, *, lock_timeout_s: float = 5.0) -> sql.Engine:
    """Open a database and make the tables that are absent; safe when several replicas start at once.

    Args:
        url: SQLAlchemy's, e.g. `sqlite:////path/gateway.db`, `postgresql+psycopg://host/modelyard`.
        lock_timeout_s: how long a SQLite transaction waits for that of another process.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    try:
        parsed = sql.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            _make_folder(parsed.database)
            engine = sql.create_engine(parsed, hide_parameters=True, connect_args={"timeout": lock_timeout_s})
            sql.event.listen(engine, "connect", _shared_sqlite)
            sql.event.listen(engine, "begin", _begin_immediate)
        else:
            engine = sql.create_engine(parsed, hide_parameters=True, pool_pre_ping=True)
        try:
            _create(engine, tables)
        except sql.exc.DBAPIError:
            _create(engine, tables)  # another replica made them between our look and our try
    except (sql.exc.SQLAlchemyError, ImportError, OSError) as error:
        raise unreachable(url, error) from error
    return engine


def unreachable(url: str, error: Exception) -> StorageError:
    """What to tell about a failed statement; the URL without its password."""
    try:
        shown = sql.make_url(url).render_as_string(hide_password=True)
    except sql.exc.ArgumentError:
        shown = "(not a database URL)"
    reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
    return StorageError(f"gateway database {shown}: {reason}", "check that it runs and that its disk has room")


def _create(engine: sql.Engine, tables: sql.MetaData) -> None:
    with engine.begin() as connection:
        tables.create_all(connection)


def _make_folder(path: str | None) -> None:
    if path and path != ":memory:" and (folder := os.path.dirname(path)):  # noqa: PTH120  (also for "file:" names)
        os.makedirs(folder, exist_ok=True)  # noqa: PTH103


def _shared_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # sqlite3 begins nothing by itself; `_begin_immediate` does
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose the last moments of counting, never the file
    cursor.close()


def _begin_immediate(connection: sql.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
