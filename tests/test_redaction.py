"""Values of the environment that are not to be written, in texts and in options."""

import argparse

import pytest
from omegaconf import OmegaConf

from lit_stability import redaction
from lit_stability.redaction import keep_out, redacted, redacted_tree


@pytest.fixture(autouse=True)
def _values(monkeypatch):
    monkeypatch.setattr(redaction, "_expressions", {})
    keep_out(
        {
            "hunter2-secret": "${oc.env:PASSWORD}",
            "postgres://me:hunter2-secret@host": "postgres://me:${oc.env:PASSWORD}@host",
            "adam": "${oc.env:OPTIMIZER}",
            "/data/set/one": "${oc.env:DATA}",
            "": "${oc.env:EMPTY}",
        }
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "401 for hunter2-secret, hunter2-secret!",
            "401 for ${oc.env:PASSWORD}, ${oc.env:PASSWORD}!",
        ),
        ("at postgres://me:hunter2-secret@host", "at postgres://me:${oc.env:PASSWORD}@host"),
        ("adamant about adam", "adamant about adam"),
        ("no file /data/set/one/x", "no file /data/set/one/x"),
        ("", ""),
    ],
)
def test_long_value_is_replaced_in_a_text_and_no_word_or_path(text, expected):
    assert redacted(text) == expected


def test_option_that_equals_a_value_is_replaced_however_short():
    options = {"optimizer": "adam", "deep": [{"root": "/data/set/one"}], "lr": 0.1, "name": "adamw"}
    found = redacted_tree(options, options=True)
    assert found == {
        "optimizer": "${oc.env:OPTIMIZER}",
        "deep": [{"root": "${oc.env:DATA}"}],
        "lr": 0.1,
        "name": "adamw",
    }
    assert options["optimizer"] == "adam"
    assert redacted_tree({"optimizer": "adam"}) == {"optimizer": "adam"}


def test_containers_of_other_types_keep_their_type():
    config = OmegaConf.create({"key": "hunter2-secret"})
    found = redacted_tree(config, options=True)
    assert OmegaConf.to_container(found, resolve=False) == {"key": "${oc.env:PASSWORD}"}
    assert config.key == "hunter2-secret"
    namespace = argparse.Namespace(a=1)
    assert redacted_tree([namespace, ("adam",)], options=True) == [
        namespace,
        ("${oc.env:OPTIMIZER}",),
    ]
