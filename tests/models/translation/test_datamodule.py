"""The data for a Trainer, T5."""

import pytest
import torch

from models.translation.corpus import FOLDER
from models.translation.datamodule import TranslationDataModule

SMALL = {"n_train": 300, "n_val": 40, "n_test": 40, "batch_size": 32}


def ready(**options):
    datamodule = TranslationDataModule(**{**SMALL, **options})
    datamodule.setup()
    return datamodule


@pytest.fixture
def corpus_root(tmp_path):
    for chapter in range(40):
        folder = tmp_path / FOLDER / f"书/{chapter}"
        folder.mkdir(parents=True)
        (folder / "source.txt").write_text("王怒。\n" * 4 + "\n", encoding="utf-8")
        (folder / "target.txt").write_text("君王生气。\n" * 4 + "\n", encoding="utf-8")
    return str(tmp_path)


def test_loaders_of_equal_seeds_give_equal_batches():
    """T5: the same sentences in the same order."""
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        runs = [list(getattr(ready(seed=3), loader)()) for _ in range(2)]
        assert len(runs[0]) == len(runs[1]) > 1
        for one, other in zip(*runs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_loaders_of_different_seeds_differ():
    first, other = (next(iter(ready(seed=seed).train_dataloader())) for seed in (0, 1))
    assert first.source_BS.shape != other.source_BS.shape or (
        not torch.equal(first.source_BS, other.source_BS)
    )


def test_batches_do_not_depend_on_the_global_generator():
    torch.manual_seed(0)
    one = list(ready().train_dataloader())
    torch.manual_seed(1)
    other = list(ready().train_dataloader())
    assert all(torch.equal(a.target_BT, b.target_BT) for a, b in zip(one, other, strict=True))


def test_vocabulary_is_built_from_training_pairs_alone():
    """T5."""
    datamodule = ready()
    seen = {char for pair in datamodule.splits.train for side in pair for char in side}
    assert set(datamodule.vocabulary.characters) == seen


def test_setup_twice_builds_once():
    datamodule = ready()
    splits = datamodule.splits
    datamodule.setup("test")
    assert datamodule.splits is splits


def test_vocabulary_and_splits_before_setup_say_what_to_call():
    datamodule = TranslationDataModule(**SMALL)
    for name in ("vocabulary", "splits"):
        with pytest.raises(RuntimeError, match=r"datamodule.setup\(\)"):
            getattr(datamodule, name)


def test_corpus_source_reads_below_the_root_and_reports(corpus_root):
    """T5."""
    datamodule = ready(source="classical_modern", root=corpus_root, val_fraction=0.2)
    assert datamodule.report.n_pairs == 160
    assert datamodule.report.n_empty == 40
    assert sum(map(len, datamodule.splits)) <= 160
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.source_BS.shape == (32, 4)
    assert batch.target_BT.shape == (32, 7)


def test_test_on_the_training_pairs_is_about_those_and_no_others():
    """T4: to ask whether they have been learnt by heart."""
    datamodule = ready(n_train=20, test_on="train")
    tested = [row for batch in datamodule.test_dataloader() for row in batch.source_BS.tolist()]
    decoded = {datamodule.vocabulary.decode(row) for row in tested}
    assert decoded == {pair.source for pair in datamodule.splits.train}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, "source='web'"),
        ({"source": "classical_modern"}, "source='classical_modern' with root=None"),
        ({"root": "/data"}, "source='grammar' with root='/data'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"n_val": 0}, "n_val=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"test_on": "training"}, "test_on='training'.*train"),
    ],
)
def test_datamodule_with_a_wrong_option_repeats_it(options, message):
    with pytest.raises(ValueError, match=message):
        TranslationDataModule(**options)


def test_real_corpus_is_read_split_and_batched(corpus_on_disk):
    """T5: the whole corpus on disk, when there is one."""
    options = {"source": "classical_modern", "root": corpus_on_disk, "n_train": 1000}
    datamodule = ready(**options, max_length=64, long_pairs="truncate")
    assert datamodule.report.n_pairs + datamodule.report.n_empty > 1000
    assert all(len(side) <= 63 for pair in datamodule.splits.train for side in pair)
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.target_BT.shape[1] <= 65
