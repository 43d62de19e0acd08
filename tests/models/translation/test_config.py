"""The shape of a Transformer, checked on construction."""

import dataclasses

import pytest

from models.translation.config import TransformerConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model=0"),
        ({"n_heads": 3}, "d_model=128 must be even and divisible by n_heads=3"),
        ({"d_model": 9, "n_heads": 3}, "choose a multiple of 6"),
        ({"n_encoder_layers": 0}, "n_encoder_layers=0"),
        ({"n_decoder_layers": -1}, "n_decoder_layers=-1"),
        ({"d_feedforward": 0}, "d_feedforward=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"pad_id": -1}, "pad_id=-1"),
        ({"vocabulary_size": 3, "pad_id": 3}, "vocabulary_size=3 must exceed pad_id=3"),
        ({"norm_position": "middle"}, "norm_position='middle'"),
        ({"norm": "batchnorm"}, "norm='batchnorm'.*rmsnorm"),
        ({"feedforward": "gelu"}, "feedforward='gelu'.*swiglu"),
        ({"attention": "flash"}, "attention='flash'.*manual"),
        ({"mask_convention": "keep"}, "mask_convention='keep'.*attend"),
        ({"init": "zero"}, "init='zero'.*zombie"),
        ({"init": "inner_zero", "norm_position": "post"}, "needs norm_position='pre'"),
    ],
)
def test_config_with_a_wrong_value_repeats_it(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**options)


def test_config_of_the_medium_model_is_expressible():
    """V2: 16 layers of width 512, pre-norm, RMSNorm, SwiGLU."""
    config = TransformerConfig(
        d_model=512,
        n_heads=8,
        n_encoder_layers=8,
        n_decoder_layers=8,
        d_feedforward=1408,
        norm_position="pre",
        norm="rmsnorm",
        feedforward="swiglu",
    )
    assert config.n_encoder_layers + config.n_decoder_layers == 16


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TransformerConfig().d_model = 64
