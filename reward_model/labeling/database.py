"""The database of a labeling project: SQLite in its folder, or PostgreSQL by URL, with tables that are up to date."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext, MigrationStep
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError

from rlhf.config_labeling import LabelingStage
from rlhf.errors import ConfigError, LabelError

FILE = "labels.sqlite3"
MIGRATIONS = Path(__file__).parent / "migrations"

BUSY_SECONDS = 30
"""How long SQLite waits for another process that is writing."""

_MIGRATION_LOCK = 7_305_021_466
"""Key of the advisory lock under which PostgreSQL's tables are changed: any number that nobody else takes."""


def open_database(cfg: LabelingStage) -> Engine:
    """The project's database, made or migrated where needed.

    On SQLite a transaction whose connection has the execution option `write` takes the write lock at its beginning.

    Raises:
        ConfigError: the folder cannot be written, the variable is missing or holds no PostgreSQL URL, or the server
            does not answer.
        LabelError: a newer version wrote the database.
    """
    engine = _sqlite(Path(cfg.run_dir)) if cfg.database_env is None else _postgresql(cfg.database_env)
    try:
        with engine.execution_options(write=True).begin() as connection:
            migrate(connection)
    except DBAPIError as error:
        engine.dispose()
        raise _unusable(cfg, engine.url, error) from None
    except BaseException:
        engine.dispose()
        raise
    return engine


def _sqlite(folder: Path) -> Engine:
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Made here, for the owner alone: it holds password hashes. SQLite's own side files take its mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigError(
            f"run_dir: cannot write {path}: {error.strerror}", fix="set run_dir to a folder that you may write to"
        ) from None
    engine = create_engine(
        URL.create("sqlite", database=str(path.resolve())),
        connect_args={"timeout": BUSY_SECONDS},
        pool_size=16,
        max_overflow=48,
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # BEGIN is ours: sqlite3 would send it late, and never IMMEDIATE
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and asks for the write lock later would fail where another wrote in between.
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _postgresql(variable: str) -> Engine:
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(
            f"database_env: the environment variable {variable} is not set",
            fix=f"export {variable}=postgresql://user:password@host/database, or leave database_env out for SQLite",
        )
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        url = None
    if url is None or url.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise ConfigError(  # the value is not shown: it holds a password
            f"database_env: {variable} holds no URL of a PostgreSQL database",
            fix="write it as postgresql://user:password@host:5432/database",
        )
    try:
        return create_engine(
            url.set(drivername="postgresql+psycopg"),
            isolation_level="READ COMMITTED",
            connect_args={"connect_timeout": 10},
            pool_pre_ping=True,
            pool_size=16,
            max_overflow=16,
        )
    except ModuleNotFoundError:
        raise ConfigError(
            "database_env: PostgreSQL needs psycopg, which is not installed",
            fix="pip install 'rlhf-pipeline[postgres]'",
        ) from None


def _unusable(cfg: LabelingStage, url: URL, error: DBAPIError) -> ConfigError:
    said = str(error.orig).strip()
    if cfg.database_env is None:
        return ConfigError(
            f"run_dir: {url.database} cannot be used: {said}",
            fix="set run_dir to a folder that you may write to, or move the damaged file away",
        )
    said = said.replace(url.password, "***") if isinstance(url.password, str) and url.password else said
    return ConfigError(
        f"database_env: the PostgreSQL server of {cfg.database_env} cannot be used: {said}",
        fix=f"start the server, or correct host, database, user and password in {cfg.database_env}",
    )


_FULL = "its disk is full", "free some space where the database is"
_READ_ONLY = "it is read-only", "give the server's user the right to write it, or mount its disk for writing"
_TROUBLE = {
    # SQLite's primary result codes, and PostgreSQL's SQLSTATE
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_IOERR: ("its disk fails", "look into the system's log; check the disk, and whether it is full"),
    sqlite3.SQLITE_CANTOPEN: ("its file cannot be opened", "check that run_dir is there, and may be written"),
    "53100": _FULL,
    "25006": ("it is read-only", "point database_env to the primary server, or end its default_transaction_read_only"),
}


def trouble_of(error: DBAPIError) -> tuple[str, str] | None:
    """Why the database cannot be written, and what mends it; None where the error is of another kind."""
    sqlite_code = getattr(error.orig, "sqlite_errorcode", None)
    return _TROUBLE.get(getattr(error.orig, "sqlstate", None) if sqlite_code is None else sqlite_code & 0xFF)


def migrate(connection: Connection) -> None:
    """Bring the tables to the newest revision, in the transaction that `connection` is in.

    Raises:
        LabelError: the database is of a revision that this version does not know.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
    scripts = ScriptDirectory(str(MIGRATIONS), version_locations=[str(MIGRATIONS)])

    def steps(heads: tuple[str, ...], _: MigrationContext) -> list[MigrationStep]:
        missing = list(scripts.iterate_revisions("head", heads))
        return [MigrationStep.upgrade_from_script(scripts.revision_map, script) for script in reversed(missing)]

    context = MigrationContext.configure(connection, opts={"fn": steps})
    known = {script.revision for script in scripts.walk_revisions()}
    if unknown := set(context.get_current_heads()) - known:
        raise LabelError(
            f"the labeling database is of revision {', '.join(sorted(unknown))}, written by a newer version",
            fix="upgrade rlhf-pipeline to the version that wrote it",
        )
    with Operations.context(context):
        context.run_migrations()
