"""Reading only what is a regular file, whatever a path leads to."""

import errno
import hashlib
import itertools
import os
import socket
import unicodedata

import pytest

from uscl_hub.errors import UserError
from uscl_hub.files import (
    NotAFile,
    check_regular,
    check_room,
    existing,
    finished,
    open_regular,
    sha256,
    write_json,
    write_text,
    write_whole,
)


def special(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may have 107 characters only
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
        os.chdir(here)
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
@pytest.mark.parametrize("read", [check_regular, open_regular, sha256])
def test_what_is_no_file_is_refused_at_once_by_name(tmp_path, kind, read):
    path = special(kind, tmp_path / "x")
    with pytest.raises(NotAFile, match=rf"{path}: is a .*{kind}.* not a regular file") as error:
        read(path)
    assert isinstance(error.value, UserError) and isinstance(error.value, OSError)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(NotAFile, match="link: is a"):
        read(tmp_path / "link")


def test_regular_files_and_links_to_them(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    for name in "ab":
        assert sha256(tmp_path / name) == hashlib.sha256(b"abc").hexdigest()
        assert check_regular(tmp_path / name).st_size == 3
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "c")


# ------------------------------------------------------------------------------------------------ whole files


def test_two_processes_of_one_number_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    """As in two containers, or on two hosts, that share a folder."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "a.json"

    def outer(part):
        part.write_text("outer")
        write_whole(path, lambda other: other.write_text("inner"))
        assert path.read_text() == "inner" and part.read_text() == "outer"

    write_whole(path, outer)
    assert path.read_text() == "outer" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path, there):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "real.txt", tmp_path / "link.txt"
    if there:
        target.write_text("old")
        target.chmod(0o640)
    link.symlink_to("elsewhere/real.txt")
    write_text(link, "grün")
    assert link.is_symlink() and target.read_bytes() == "grün".encode()
    assert not there or target.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path / "elsewhere") == ["real.txt"]


def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a named pipe"), ("folder", "a folder")):
        with pytest.raises(NotAFile, match=f"{name}: is {kind}"):
            write_text(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(NotAFile, match="/dev/null: is a device"):
        write_text("/dev/null", "x")


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        write_text(tmp_path / "file" / "a.txt", "x")
    assert ".tmp" not in str(error.value)
    with pytest.raises(OSError) as error:
        write_text(tmp_path / ("x" * 300), "x")
    assert ".tmp" not in str(error.value)


def test_long_names_have_room_for_the_temporary_one(tmp_path):
    path = tmp_path / ("ü" * 120 + ".json")
    write_json(path, {"a": "ß"})
    assert path.read_text(encoding="utf-8") == '{\n "a": "\\u00df"\n}\n'


def test_what_utf8_cannot_hold_is_written_out(tmp_path):
    write_text(tmp_path / "a.txt", "name \udcff")
    assert (tmp_path / "a.txt").read_bytes() == b"name \\udcff"


def test_the_temporary_file_has_the_suffix(tmp_path):
    names = []
    write_whole(tmp_path / "a.png", lambda part: (names.append(part.name), part.write_bytes(b"x")))
    assert names[0].endswith(".png") and names[0].startswith(".")


def test_what_a_killed_process_leaves_is_not_finished(tmp_path):
    def killed(part):
        part.write_bytes(b"half")
        names.append(part.name)

    names = []
    write_whole(tmp_path / "a.parquet", killed)
    (tmp_path / names[0]).write_bytes(b"half")
    (tmp_path / ".hidden.parquet").write_bytes(b"x")  # a user's
    (tmp_path / "b.json").write_bytes(b"x")
    assert [path.name for path in finished(tmp_path, ".parquet")] == [".hidden.parquet", "a.parquet"]


def test_room_is_looked_for_before_it_is_needed(tmp_path):
    check_room(tmp_path)
    with pytest.raises(OSError, match="MiB are needed here") as error:
        check_room(tmp_path, 10**18)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_room(tmp_path / "nowhere")
    assert os.listdir(tmp_path) == []


def test_a_path_is_found_in_whatever_spelling_each_of_its_names_has(tmp_path):
    composed, apart = (unicodedata.normalize(form, "ü") for form in ("NFC", "NFD"))
    for folder, name in ((composed, apart), (apart + "2", composed)):
        file = tmp_path / folder / name
        file.parent.mkdir()
        file.touch()
        for given in itertools.product({folder, folder.replace(composed, apart)}, (composed, apart)):
            assert existing(tmp_path.joinpath(*given)) == file
        assert existing(file.with_name("u")) is None
    assert existing(tmp_path / ("n" * 300)) is existing("a\0b") is None
