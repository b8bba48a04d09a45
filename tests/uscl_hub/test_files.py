"""Reading only what is a regular file, whatever a path leads to."""

import hashlib
import os
import socket

import pytest

from uscl_hub.errors import UserError
from uscl_hub.files import NotAFile, check_regular, open_regular, sha256


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
