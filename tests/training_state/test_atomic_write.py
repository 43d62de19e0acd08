"""Files that are written completely or not at all."""

import os
import stat

import pytest

from lit_stability.training_state.atomic_write import write_and_keep, write_atomically


def full(*args):
    raise OSError(28, "No space left on device")


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("content", [b"new", lambda file: file.write(b"new")])
@pytest.mark.parametrize("fsync", [False, True])
def test_bytes_and_a_function_write_the_same_file(content, fsync, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    write_atomically(path, content, partial=".part-a.txt", fsync=fsync)
    assert (path.read_bytes(), names(tmp_path)) == (b"new", ["a.txt"])


def test_content_is_in_the_partial_file_until_it_is_complete(tmp_path):
    def content(file):
        file.write(b"new")
        file.flush()
        assert (tmp_path / ".part-a.txt").read_bytes() == b"new"
        assert not (tmp_path / "a.txt").exists()

    write_atomically(tmp_path / "a.txt", content, partial=".part-a.txt")
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("place", ["content", "fsync", "replace"])
def test_failure_leaves_the_old_file_unchanged_and_no_partial_file(place, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    content = full if place == "content" else b"new"
    with monkeypatch.context() as patched:
        if place != "content":
            patched.setattr(os, place, full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, content, partial="a.txt.partial", fsync=True)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["a.txt"])


@pytest.mark.parametrize(("fsync", "count"), [(False, 0), (True, 2)])
def test_file_and_folder_are_flushed_where_it_is_asked_for(fsync, count, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    write_atomically(tmp_path / "a.txt", b"new", partial=".part-a.txt", fsync=fsync)
    assert len(flushed) == count


def test_existing_file_with_other_content_is_kept_under_the_next_number(tmp_path):
    path = tmp_path / "runs" / "a.txt"
    for text in ("one", "one", b"two", "three"):
        write_and_keep(path, text)
    assert {f.name: f.read_text() for f in path.parent.iterdir()} == {
        "a.txt": "three",
        "a.1.txt": "one",
        "a.2.txt": "two",
    }


def test_private_file_can_be_read_by_the_user_alone_from_its_first_byte(tmp_path):
    path = tmp_path / "secret.yaml"
    modes = []
    (tmp_path / "part").write_text("of a killed process")

    def write(file):
        file.write(b"password")
        modes.append(stat.S_IMODE((tmp_path / "part").stat().st_mode))

    write_atomically(path, write, partial="part", private=True)
    assert modes == [0o600]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_and_keep(path, "another", private=True)
    kept = [file for file in tmp_path.iterdir() if file != path]
    assert {stat.S_IMODE(file.stat().st_mode) for file in [path, *kept]} == {0o600}


def test_file_of_an_earlier_version_becomes_private_when_it_is_written_again(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: 1")
    path.chmod(0o644)
    write_and_keep(path, "a: 1", private=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
