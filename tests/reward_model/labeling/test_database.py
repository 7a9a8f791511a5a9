"""The database is made, brought up to date or refused, and what is wrong with it is said."""

from __future__ import annotations

import logging
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from reward_model.labeling.schema import Base
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage
from rlhf.errors import ConfigError, LabelError, RlhfError


def refusal(**keys: Any) -> RlhfError:
    with pytest.raises(RlhfError) as caught:
        LabelStore.open(LabelingStage(**keys))
    return caught.value


def test_the_migrations_make_the_tables_of_the_schema(project: Any) -> None:
    store = project.open()
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        assert context.get_current_revision() == "0001"


def test_the_comparison_of_tables_sees_a_difference(project: Any) -> None:
    store = project.open()
    with store.begin() as session:
        session.execute(text("DROP INDEX ix_items_serving"))
        session.execute(text("ALTER TABLE users ADD COLUMN height INTEGER"))
    with store.engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert sorted(change[0] for change in found) == ["add_index", "remove_column"]


def test_opening_again_keeps_what_is_there(project: Any, make_items: Any) -> None:
    project.open().add_items(make_items(3))
    assert len(project.open().items()) == 3


def test_a_database_of_a_newer_version_is_refused(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(1))
    with store.begin() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(LabelError, match=r"revision 9999.*newer version") as caught:
        project.open()
    assert "upgrade rlhf-pipeline" in caught.value.fix
    assert len(store.items()) == 1


def test_sqlite_waits_for_the_disk_and_lets_readers_in(tmp_path: Path) -> None:
    with LabelStore.open(LabelingStage(run_dir=str(tmp_path))) as store, store.read() as session:
        pragmas = [session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")]
        assert pragmas == ["wal", 2, 1]  # 2 is FULL
        assert session.scalar(text("PRAGMA busy_timeout")) == 30_000
    assert stat.S_IMODE((tmp_path / "labels.sqlite3").stat().st_mode) == 0o600


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = refusal(run_dir=str(tmp_path / "file" / "labels"))
    assert isinstance(error, ConfigError)
    assert str(tmp_path / "file") in error.message
    assert error.message.startswith("run_dir:")
    assert "set run_dir" in error.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refusal(run_dir=str(tmp_path)).message


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "labels.sqlite3"
    file.write_bytes(b"something else entirely, " * 100)
    error = refusal(run_dir=str(tmp_path))
    assert "not a database" in error.message
    assert file.read_bytes().startswith(b"something else")


def test_a_missing_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LABELS_URL", raising=False)
    error = refusal(run_dir=str(tmp_path), database_env="LABELS_URL")
    assert "database_env: the environment variable LABELS_URL is not set" in error.message
    assert "export LABELS_URL=postgresql://" in error.fix


@pytest.mark.parametrize("url", ["mysql://u:hush@h/d", "postgresql//u:hush@h/d", "hush", "postgresql://u:hush@h:x/d"])
def test_what_is_no_postgresql_url_is_refused_without_showing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("LABELS_URL", url)
    error = refusal(run_dir=str(tmp_path), database_env="LABELS_URL")
    assert "LABELS_URL holds no URL" in error.message
    assert "hush" not in str(error)


def test_a_server_that_does_not_answer_is_named_without_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        port = held.getsockname()[1]
        monkeypatch.setenv("LABELS_URL", f"postgresql://someone:hush@127.0.0.1:{port}/labels")
        error = refusal(run_dir=str(tmp_path), database_env="LABELS_URL")
    assert isinstance(error, ConfigError)
    assert "LABELS_URL" in error.message
    assert "refused" in error.message
    assert "hush" not in str(error) + caplog.text
    assert error.__suppress_context__


def test_a_password_in_the_servers_own_words_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: Any
) -> None:
    url = postgres.database()
    monkeypatch.setenv("LABELS_URL", url.replace("postgres@/postgres", "postgres:hush@/hush"))
    error = refusal(run_dir=str(tmp_path), database_env="LABELS_URL")
    assert "does not exist" in error.message
    assert "hush" not in str(error)
