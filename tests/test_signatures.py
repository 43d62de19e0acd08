"""What `help()` and an editor show of the public names."""

import inspect

import pytest

import lit_stability
from lit_stability import detectors
from lit_stability.policies import clip_rules


def public():
    for module in (lit_stability, detectors, clip_rules):
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing) and not getattr(thing, "_is_protocol", False):
                yield pytest.param(thing, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("thing", [*public()])
def test_signature_shows_types_and_not_strings(thing):
    signature = inspect.signature(thing)
    found = [p.annotation for p in signature.parameters.values()] + [signature.return_annotation]
    assert [text for text in found if isinstance(text, str)] == []


@pytest.mark.parametrize("name", lit_stability.__all__)
def test_docstring_has_an_example(name):
    thing = getattr(lit_stability, name)
    own = inspect.getdoc(thing) or ""
    assert ">>>" in own or ">>>" in (getattr(thing, "__init__", thing).__doc__ or ""), name
