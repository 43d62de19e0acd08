"""A config that a fit of this user wrote is known; one that was changed or copied is not."""

import logging
import stat

import pytest

from lit_stability.cli.signature import VARIABLE, is_signed, sign, signature_file


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "home" / "key"))
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "config.yaml"
    path.write_text("model: {_target_: m.A}")
    return path


def test_config_is_known_after_it_was_signed_wherever_its_folder_goes(config):
    assert not is_signed(config)
    sign(config)
    assert is_signed(config)
    moved = config.parent.rename(config.parent.with_name("moved"))
    assert is_signed(moved / "config.yaml")


def test_changed_config_is_not_known(config):
    sign(config)
    config.write_text("model: {_target_: m.B}")
    assert not is_signed(config)


def test_signature_of_another_user_is_not_known(config, monkeypatch, tmp_path):
    sign(config)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other" / "key"))
    assert not is_signed(config)
    other = tmp_path / "other.yaml"
    other.write_text("a: 1")
    sign(other)
    assert is_signed(other)
    assert not is_signed(config), "there is a key now, but another one"


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"\xff\xfe", "ä".encode() * 64])
def test_damaged_signature_is_not_known(config, content):
    sign(config)
    signature_file(config).write_bytes(content)
    assert not is_signed(config)


@pytest.mark.parametrize("key", [b"", b"short"])
def test_key_that_could_be_guessed_is_not_used(config, key, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/key").write_bytes(key)
    sign(config)
    assert not is_signed(config)


def test_key_and_signature_can_be_read_by_the_user_alone(config, tmp_path):
    sign(config)
    for path in (tmp_path / "home/key", signature_file(config)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in (tmp_path / "home").iterdir()] == ["key"]


def test_key_is_kept_for_the_next_run(config, tmp_path):
    sign(config)
    key = (tmp_path / "home/key").read_bytes()
    sign(config)
    assert (tmp_path / "home/key").read_bytes() == key


def test_home_that_cannot_be_written_is_logged_and_stops_nothing(config, monkeypatch, caplog):
    monkeypatch.setenv(VARIABLE, str(config / "below a file" / "key"))
    with caplog.at_level(logging.WARNING):
        sign(config)
    assert "a resume will ask for --trust" in caplog.text
    assert not is_signed(config)
