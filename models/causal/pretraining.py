"""The embedded trunk: a small Qwen2 with a tokenizer, trained here on the embedded sentences.

It is made on its first use and kept in the user's cache; the same recipe gives the same weights
on the same machine. It exists so that a trunk which has learnt something can be had without a
download, through the same files and the same functions as a real one. May import torch,
transformers and tokenizers.
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
    """What decides the weights."""

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
        """Names the cache: another recipe, or other sentences, make another trunk."""
        sources = "".join(inspect.getsource(module) for module in (facts, sentences))
        return hashlib.sha256(f"{asdict(self)}{sources}".encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """`LIT_STABILITY_CACHE`, or `lit_stability` in the user's cache."""
    named = os.environ.get("LIT_STABILITY_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_stability"


def embedded_folder(recipe: Recipe | None = None) -> Path:
    """Give the folder of the embedded trunk, and make it first if it is not there.

    Of several processes one makes it and the others wait. Generators of the caller are not
    touched. Writing is atomic: a folder with that name is complete.
    """
    recipe = recipe or Recipe()
    folder = cache_folder() / f"qwen2-embedded-{recipe.key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            print(f"making the embedded Qwen2 trunk once, in {folder}", file=sys.stderr)
            draft = Path(tempfile.mkdtemp(prefix="draft-", dir=folder.parent))
            try:
                make(recipe, draft)
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder


def make(recipe: Recipe, folder: Path) -> float:
    """Train tokenizer and trunk, save both as `from_pretrained` wants them; gives the last loss."""
    drawn = sentences.SentenceSource().draw(f"pretraining {recipe.seed}")
    texts = list(itertools.islice(drawn, recipe.n_sentences))
    tokenizer = _train_tokenizer([each.initial_state + each.ending for each in texts], recipe)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Qwen2ForCausalLM(_config(recipe, len(tokenizer)))
        rows = [_encode(each, tokenizer) for each in texts]
        loss = _train(model, rows, recipe)
    with without_progress_bar():
        model.save_pretrained(folder)
    return loss


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing bars over those of a fit."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _train_tokenizer(texts: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE, as Qwen's is."""
    bare = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary_size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=_END, pad_token=_END)


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
    """Cut where the classifier cuts, before what comes next, and end."""
    pieces = (sentence.initial_state, sentence.ending)
    ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]
    return torch.tensor([*ids, tokenizer.eos_token_id])


def _train(model: Qwen2ForCausalLM, rows: Sequence[Tensor], recipe: Recipe) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.n_steps)
    loss = torch.tensor(0.0)
    for _ in range(recipe.n_steps):
        chosen = torch.randint(len(rows), (recipe.batch_size,)).tolist()
        ids_BL = pad_sequence([rows[i] for i in chosen], batch_first=True, padding_value=_IGNORED)
        mask_BL = (ids_BL != _IGNORED).long()
        logits_BLV = model(input_ids=ids_BL.clamp(min=0), attention_mask=mask_BL).logits
        loss = F.cross_entropy(
            logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(loss.detach())
