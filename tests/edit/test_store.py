"""No step is lost and none is half there: killed anywhere, two processes at once, a full disk, damage."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from pico import SPEC, photo, save_model

from fluxloom.api import Loom
from fluxloom.edit import store as stores
from fluxloom.edit.chain import verify_session
from fluxloom.edit.session import Session
from fluxloom.errors import BadInput, Failure, OutputError
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.request import Result
from fluxloom.infer.runtime import Runtime

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")
Edit = Callable[..., Result]


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory) -> Edit:
    """Edits of photo(), drawn beforehand, so that a process is mostly at work on the store."""
    folder = save_model(tmp_path_factory.mktemp("pico"), SPEC)
    loom = Loom(Pipeline(Runtime.from_folder(folder, SPEC, torch.device("cpu"), torch.float32)))
    drawn = [loom.edit(photo(), "snow", seed=seed, steps=1, true_cfg=1.0) for seed in range(4)]
    return lambda picture, instruction, seed, **fields: drawn[seed % len(drawn)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """OpenCV's other threads do not outlive a fork."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(before)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    found = Session.create(tmp_path / "session", seed=1)
    found.import_picture(photo())
    return found


def forked(work: Callable[[], object]) -> int:
    """Start a process that does the work and then exits with 0; its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which do nothing here
        child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except OutputError:
            os._exit(7)
        finally:
            os._exit(8)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def step(session: Session, edit: Edit) -> str:
    """An edit of the first picture."""
    return session.edit(edit, "snow", at=session.log()[0].id).id


def whole(session: Session) -> None:
    """Everything that can be seen is sound, and the next step works."""
    again = Session.open(session.store.folder)
    assert [found for found in verify_session(again) if found.state == "broken"] == []
    place = again.position.node
    assert place is None or again.node(place[:20]).current


class Steps:
    """Ends the process at the n-th thing that it does to files of a folder or to a database."""

    def __init__(self, n: int, folder: Path) -> None:
        self.left, self.folder = n, str(folder)

    def count(self) -> None:
        self.left -= 1
        if self.left < 0:
            os._exit(9)

    def set_up(self) -> None:
        """In a process of its own: what is done here cannot be undone."""
        sys.addaudithook(self._seen)
        fsync, connect, outer = os.fsync, sqlite3.connect, self

        def counted(descriptor: int) -> None:
            outer.count()
            fsync(descriptor)

        class Connection(sqlite3.Connection):
            def execute(self, *words: Any) -> sqlite3.Cursor:
                outer.count()
                found = super().execute(*words)
                if words[0] == "COMMIT":
                    outer.count()
                return found

        os.fsync = counted
        sqlite3.connect = lambda *a, **k: connect(*a, factory=Connection, **k)

    def _seen(self, event: str, words: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove") and any(self.folder in str(word) for word in words):
            self.count()


def killed_everywhere(folder: Path, work: Callable[[], object], check: Callable[[bool], None]) -> int:
    """Do the work in processes that end at their first, second ... step, until one gets through."""
    for n in range(1000):

        def child(n: int = n) -> None:
            Steps(n, folder).set_up()
            work()

        code = ended(forked(child))
        assert code in (0, 9)
        check(code == 0)
        if code == 0:
            return n
    raise AssertionError("it never ended")


def test_killed_at_every_step_of_an_edit(session: Session, edit: Edit) -> None:
    before = len(session.log())

    def check(done: bool) -> None:
        nonlocal before
        nodes = session.log()
        assert len(nodes) - before in ((1,) if done else (0, 1))
        assert len(nodes) == before or nodes[-1].current  # its row and the move to it are one
        before = len(nodes)
        whole(session)

    steps = killed_everywhere(session.store.folder, lambda: step(session, edit), check)
    assert steps > 30
    assert sorted(path.name for path in session.store.folder.iterdir()) == ["objects", "session.db"]
    drafts = [path for path in session.store.objects.iterdir() if path.is_file()]
    assert drafts  # what the killed have left
    assert session.gc() == {"removed": 0, "bytes": 0}  # young
    assert session.gc(age=0)["removed"] >= len(drafts)
    assert not any(path.is_file() for path in session.store.objects.iterdir())
    whole(session)


def test_killed_at_every_step_of_a_beginning(tmp_path: Path) -> None:
    folder = tmp_path / "new"

    def check(done: bool) -> None:
        try:
            Session.open(folder)
        except BadInput:
            assert not done

    def begin() -> None:
        with suppress(BadInput):  # one was killed after all was done
            Session.create(folder)

    assert killed_everywhere(folder, begin, check) > 10
    Session.open(folder).import_picture(photo())


def test_killed_at_random(session: Session, edit: Edit) -> None:
    dice, said = random.Random(0), []
    for _ in range(10):
        reader, writer = os.pipe()

        def work(writer: int = writer) -> None:
            while True:
                os.write(writer, step(session, edit).encode())

        child = forked(work)
        os.close(writer)
        with open(reader) as pipe:
            text = pipe.read(64)  # waits for the first
            time.sleep(dice.uniform(0.0, 0.2))
            os.kill(child, signal.SIGKILL)
            assert ended(child) == -signal.SIGKILL
            text += pipe.read()
        said += [text[k : k + 64] for k in range(0, len(text), 64)]
    ids = [node.id for node in session.log()]
    assert len(said) >= 10
    assert set(said) <= set(ids)
    assert len(ids) <= len(said) + 11  # a killed one may have ended its step without saying so
    whole(session)


def test_two_at_once(session: Session, edit: Edit) -> None:
    children = [forked(lambda: [step(session, edit) for _ in range(8)]) for _ in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    nodes = session.log()
    assert len(nodes) == 17
    with session.store.reading() as db:
        assert db.execute("SELECT turn FROM session").fetchone() == (16,)  # no turn, so no fresh seed, came twice
    whole(session)


def test_a_full_disk(session: Session, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    for limit in (0, 500, 4_000, 6_000, 9_000, 16_000, 1 << 20):

        def work(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            step(session, edit)

        before = len(session.log())
        codes.append(ended(forked(work)))
        assert len(session.log()) - before == (codes[-1] == 0)
        whole(session)
    assert codes[0] == 7
    assert codes[-1] == 0
    assert set(codes) == {0, 7}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = session.log()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"No space left.*try"):
            step(session, edit)
    assert session.log() == before
    step(session, edit)
    whole(session)


def test_two_writers_take_turns(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PATIENCE", 0.1)
    with session.store.writing():
        assert len(session.log()) == 1  # readers go on
        with pytest.raises(Failure, match="another process writes for over"):
            session.import_picture(photo())


def test_what_is_damaged_or_too_new_is_said(session: Session, edit: Edit, tmp_path: Path) -> None:
    node = session.node(step(session, edit))
    path = session.store.folder / "session.db"
    good = path.read_bytes()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(Failure, match="got a session of format 99, allowed up to 1, try a newer fluxloom"):
        Session.open(session.store.folder)
    for bad in (b"x" * 8192, good[:4096] + b"\xff" * (len(good) - 4096)):
        path.write_bytes(bad)
        with pytest.raises(Failure, match=r"damaged .*session.db .*the pictures are in .*objects"):
            Session.open(session.store.folder).log()
    path.write_bytes(b"")
    with pytest.raises(BadInput, match="is no session's"):
        Session.open(session.store.folder)
    path.write_bytes(good)
    place = session.store.object(node.picture)
    data = place.read_bytes()
    place.write_bytes(data[:-1])
    with pytest.raises(Failure, match=r"got an altered file .* try a copy of the session, or another node"):
        session.edit(edit, "snow")
    place.unlink()
    with pytest.raises(Failure, match="got no file"):
        session.export(tmp_path / "a.png")
    broken = [found.detail for found in verify_session(session) if found.state == "broken"]
    assert len(broken) == 1
    assert broken[0].startswith("no file")
    assert session.log()[-1] == node
    session.edit(edit, "snow", at=session.log()[0].id)  # the same picture again: its file is whole again
    place.write_bytes(data)
    whole(session)
