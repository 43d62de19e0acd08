"""Pretrains the embedded backbone: a small Qwen2 and its tokenizer, on generated sentences.

It is trained on first use and stored in the user's cache; the same recipe gives the same weights
on the same machine. It provides a trained backbone without a download, through the same files and
functions as real weights. Imports torch, transformers and tokenizers.
"""

import hashlib
import inspect
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from models.causal import facts, sentences

_END = "<|endoftext|>"
_IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the pretraining."""

    vocabulary_size: int = 1024
    width: int = 128
    n_layers: int = 3
    d_feedforward: int = 352
    n_sentences: int = 8000
    n_steps: int = 500
    batch_size: int = 32
    lr: float = 3e-3
    seed: int = 0

    @property
    def key(self) -> str:
        """Hash of the recipe and of the source code of the sentences; names the cache folder."""
        sources = "".join(inspect.getsource(module) for module in (facts, sentences))
        return hashlib.sha256(f"{asdict(self)}{sources}".encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Returns `LIT_STABILITY_CACHE`, or `lit_stability` in the user's cache."""
    override = os.environ.get("LIT_STABILITY_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_stability"


def embedded_folder(recipe: Recipe | None = None) -> Path:
    """Returns the folder of the embedded backbone; trains the backbone first if it is missing.

    If several processes call it, one trains and the others wait. The caller's random generators do
    not change. Writing is atomic: a folder with that name is complete.
    """
    recipe = recipe or Recipe()
    folder = cache_folder() / f"qwen2-embedded-{recipe.key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            print(f"training the embedded Qwen2 backbone once, in {folder}", file=sys.stderr)
            temporary = Path(tempfile.mkdtemp(prefix="draft-", dir=folder.parent))
            try:
                pretrain(recipe, temporary)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def pretrain(recipe: Recipe, folder: Path) -> float:
    """Trains tokenizer and backbone and saves both for `from_pretrained`; returns the last loss."""
    source = sentences.SentenceSource().draw(f"pretraining {recipe.seed}")
    drawn = list(itertools.islice(source, recipe.n_sentences))
    tokenizer = _train_tokenizer([s.prefix + s.continuation for s in drawn], recipe)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Qwen2ForCausalLM(_config(recipe, len(tokenizer)))
        sequences = [_encode(sentence, tokenizer) for sentence in drawn]
        loss = _train(model, sequences, recipe)
    with without_progress_bar():
        model.save_pretrained(folder)
    return loss


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Disables the progress bars of transformers, which would overwrite those of a fit."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _train_tokenizer(texts: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, the kind that Qwen uses."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary_size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def _config(recipe: Recipe, n_tokens: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=n_tokens,
        hidden_size=recipe.width,
        intermediate_size=recipe.d_feedforward,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def _encode(sentence: sentences.Sentence, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Encodes prefix and continuation separately, as the classifier does, and appends eos."""
    pieces = (sentence.prefix, sentence.continuation)
    ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]
    return torch.tensor([*ids, tokenizer.eos_token_id])


def _train(model: Qwen2ForCausalLM, sequences: Sequence[Tensor], recipe: Recipe) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.n_steps)
    loss = torch.tensor(0.0)
    for _ in range(recipe.n_steps):
        indices = torch.randint(len(sequences), (recipe.batch_size,)).tolist()
        batch = [sequences[i] for i in indices]
        ids_BL = pad_sequence(batch, batch_first=True, padding_value=_IGNORED)
        mask_BL = (ids_BL != _IGNORED).long()
        logits_BLV = model(input_ids=ids_BL.clamp(min=0), attention_mask=mask_BL).logits
        loss = F.cross_entropy(
            logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return float(loss.detach())
