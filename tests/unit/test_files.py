"""Files that are either whole or not there."""

import os

import pytest

from lightning_longrope.files import write_text, write_whole


def test_a_new_file_takes_the_place_of_the_old_one_which_stays_as_it_is(tmp_path):
    """Who copies into it leaves a part of either where the machine stops; readers of the old one would see that."""
    path = tmp_path / "report.json"
    write_text(path, "old")
    os.link(path, tmp_path / "same")
    with path.open() as reader:
        write_text(path, "new and longer")
        assert reader.read() == (tmp_path / "same").read_text() == "old"
    assert path.read_text() == "new and longer"
    assert path.stat().st_ino != (tmp_path / "same").stat().st_ino
    assert {entry.name for entry in tmp_path.iterdir()} == {"report.json", "same"}


def test_until_a_file_is_whole_the_old_one_is_there(tmp_path):
    path = tmp_path / "report.json"
    write_text(path, "old")

    def write(file):
        file.write(b"half")
        file.flush()
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, write)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"report.json": "old"}
