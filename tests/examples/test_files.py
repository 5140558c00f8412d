import contextlib
import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from examples.llama.files import filled, locked, replaced, require_fillable, write_text


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with contextlib.suppress(KeyError), replaced(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_folder_is_there_with_all_its_files_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with contextlib.suppress(KeyError), filled(folder) as partial:
        partial.mkdir()
        (partial / "half").touch()
        raise KeyError
    assert not folder.exists()
    with filled(folder) as partial:
        partial.mkdir()
        (partial / "whole").touch()
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [folder]


def test_the_working_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with filled(Path(".")) as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
    assert (tmp_path / "new").read_text() == "new"


def test_an_existing_folder_is_filled_from_its_own_file_system(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with filled(folder) as partial:
        partial.mkdir()
        assert partial.parent == folder
    assert list(tmp_path.rglob("*")) == [folder]


def test_what_can_be_filled_is_left_as_it_is(tmp_path: Path) -> None:
    require_fillable(tmp_path)
    require_fillable(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="/proc"):
        require_fillable(Path("/proc/no"))


def test_what_else_a_folder_holds_is_left(tmp_path: Path) -> None:
    folder, neighbor = tmp_path / "folder", tmp_path / "folder.partial"
    folder.mkdir()
    neighbor.mkdir()
    for name in ("other", "same"):
        (folder / name).write_text("old")
    with filled(folder) as partial:
        partial.mkdir()
        (partial / "same").write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "other": "old",
        "same": "new",
    }
    assert set(tmp_path.iterdir()) == {folder, neighbor}


def test_a_folder_is_locked_by_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with locked(folder) as is_locked:
        assert is_locked
        with pytest.raises(BlockingIOError), locked(folder):
            pass
    with locked(folder) as is_locked:
        assert is_locked


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    holding = "import sys; from pathlib import Path; from examples.llama.files import locked\n"
    holding += "with locked(Path(sys.argv[1])):\n    print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(BlockingIOError), locked(tmp_path):
            pass
        process.kill()
    with locked(tmp_path) as is_locked:
        assert is_locked


def test_where_there_are_no_locks_a_folder_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with locked(tmp_path) as is_locked:
        assert not is_locked
