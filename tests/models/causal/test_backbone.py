"""Sources of a backbone, and rejected ones, C1."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from models.causal.backbone import (
    BackboneConfig,
    load_backbone,
    load_tokenizer,
    vocabulary_size,
)

SMALL = {"vocabulary_size": 400, "width": 32, "n_layers": 1, "n_heads": 4, "d_feedforward": 48}


def test_pretrained_trunk_has_the_weights_of_its_folder(trunk):
    backbone, saved = load_backbone(trunk), load_file(f"{trunk.path}/model.safetensors")
    embedding = backbone.get_input_embeddings().weight
    assert torch.equal(embedding, saved["model.embed_tokens.weight"])
    assert vocabulary_size(trunk) == len(embedding)
    assert load_backbone(trunk).get_input_embeddings().weight.equal(embedding)


def test_tokenizer_of_the_folder_reads_what_it_writes(trunk):
    tokenizer = load_tokenizer(trunk)
    text = "The colour of snow is 小明花了3.5元"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_trunk_in_bfloat16_is_half_as_large(trunk):
    halved = load_backbone(BackboneConfig(source="pretrained", path=trunk.path, dtype="bfloat16"))
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}


def test_qwen3_is_loaded_through_the_same_path(trunk, tmp_path):
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen3Model(Qwen3Config(**shape, **layers)).save_pretrained(tmp_path)
    found = load_backbone(BackboneConfig(source="pretrained", path=str(tmp_path)))
    assert type(found).__name__ == "Qwen3Model"


def test_random_trunk_has_the_shape_it_was_given():
    torch.manual_seed(0)
    config = BackboneConfig(source="random", **SMALL)
    backbone = load_backbone(config)
    assert tuple(backbone.get_input_embeddings().weight.shape) == (400, 32)
    assert vocabulary_size(config) == 400


def test_weights_of_another_family_are_refused(tmp_path):
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=50, num_hidden_layers=1, **shape)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a 'bert'; choose weights of \('qwen2', 'qwen3'\)"):
        load_backbone(BackboneConfig(source="pretrained", path=str(tmp_path)))


def test_pickled_weights_are_not_read(trunk, tmp_path):
    """A pickle may run code when it is opened."""
    folder = tmp_path / "pickled"
    shutil.copytree(trunk.path, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_backbone(BackboneConfig(source="pretrained", path=str(folder)))


def test_code_of_a_repository_is_not_run(trunk, tmp_path):
    folder = tmp_path / "coded"
    shutil.copytree(trunk.path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nModel = Config = dict")
    loaded = load_backbone(BackboneConfig(source="pretrained", path=str(folder)))
    assert not (tmp_path / "ran").exists()
    expected = load_backbone(BackboneConfig(source="pretrained", path=str(trunk.path)))
    weights, wanted = (list(each.parameters()) for each in (loaded, expected))
    assert len(weights) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"source": "hub"}, "source='hub': choose one of"),
        ({"source": "pretrained"}, "source='pretrained' with path=None"),
        ({"path": "/x"}, "source='embedded' with path='/x'"),
        ({"source": "pretrained", "path": "/no/such"}, "'/no/such': no such folder"),
        ({"source": "pretrained", "path": "Qwen/Qwen2.5-0.5B"}, "give the commit, 40 hexadecimal"),
        (
            {"source": "pretrained", "path": "Qwen/Qwen2.5-0.5B", "revision": "main"},
            "revision='main'",
        ),
        ({"source": "random", "width": 30}, "width=30 must be a multiple of n_heads=14"),
        ({"dtype": "float16"}, "dtype='float16': choose one of"),
    ],
)
def test_impossible_option_is_refused_with_its_value(options, problem):
    with pytest.raises(ValueError, match=problem):
        BackboneConfig(**options)


def test_pinned_commit_of_the_hub_is_accepted():
    config = BackboneConfig(source="pretrained", path="Qwen/Qwen2.5-0.5B", revision="0" * 40)
    assert (config.path, config.revision) == ("Qwen/Qwen2.5-0.5B", "0" * 40)
