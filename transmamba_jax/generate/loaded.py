"""Load a trained model with its tokenizer: text in, text out."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from transmamba_jax import data, schedule
from transmamba_jax.config import Config, KernelsConfig, ModelConfig
from transmamba_jax.generate.decode import Decoder
from transmamba_jax.generate.sampling import Sampling
from transmamba_jax.generate.text import stream_text
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import calibration, paths, storage, tensor_files

if TYPE_CHECKING:
    from transmamba_jax.evaluate.inspection import Inspection
    from transmamba_jax.evaluate.scoring import Scorer

_SHOWN = 12  # names of a folder in a message


@dataclasses.dataclass(frozen=True, repr=False)
class LanguageModel:
    """A trained model, its parameters and its tokenizer; made by `load`."""

    model: TransMamba
    params: dict[str, Any]
    tokenizer: data.Tokenizer | None
    """None: an exported folder without tokenizer.json; the methods that take text raise ValueError."""
    config: Config
    source: str
    """Path and step from which it was loaded."""

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        key: jax.Array | None = None,
        stop: str | Sequence[str] = (),
    ) -> str | list[str]:
        """Continue a text, or each text of a list, and return the new text.

        A continuation ends at the first stop string, which is left out, at the end of the document, or after
        `max_new_tokens` tokens. Texts of different lengths in one call give what each gives alone.

        Args:
            prompt: a text, or a list of texts. An empty one begins a document.
            max_new_tokens: tokens to add to each text, at most.
            temperature: 0 takes the most likely token; above, logits are divided by it and sampled.
            top_k: sample among the k most likely tokens only.
            top_p: sample among the fewest tokens whose probabilities reach this sum.
            min_p: sample among tokens at least this fraction as likely as the most likely one.
            repetition_penalty: divide the positive logits of tokens that are there already by this, multiply the
                negative.
            key: random key of the sampling, or one per text. None: `jax.random.key(0)`.
            stop: a text, or several, that end a continuation.

        Returns:
            A text for a text, a list for a list.

        Raises:
            ValueError: `prompt` is not text, or an option is out of range.
        """
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
        single, texts = isinstance(prompt, str), self._texts(prompt, "prompt")
        if not texts:
            return []
        pieces = self._pieces(texts, max_new_tokens, sampling, key, stop, block=16)
        joined = ["".join(parts) for parts in zip(*pieces, strict=True)]
        return joined[0] if single else joined

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        key: jax.Array | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the continuation of one text as it comes; arguments as for `generate`.

        The pieces joined are what `generate` returns: a character comes when its last byte is there.

        Raises:
            ValueError: as for `generate`, when called and not at the first piece.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be one text, found {_describe(prompt)}; generate takes a list of texts")
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
        pieces = self._pieces(self._texts(prompt, "prompt"), max_new_tokens, sampling, key, stop, block=8)
        return (piece for (piece,) in pieces if piece)

    def score(self, text: str | Sequence[str], *, context: str = "") -> float | list[float]:
        """Return the log-likelihood of a text, or of each text of a list, in nats.

            log p(text | context) = sum_i log p(token_i | context and the tokens before it)

        Args:
            text: a text, or a list of texts. More tokens than data.seq_len are scored in windows of that length.
            context: a text before it; empty: `text` begins a document. White space at its end is scored with `text`,
                because a token may hold both.

        Returns:
            A number for a text, a list for a list. -inf for a text that no token spells.

        Raises:
            ValueError: `text` or `context` is not text.
        """
        single, texts = isinstance(text, str), self._texts(text, "text")
        (context,) = self._texts(context, "context")
        scores = [score for score, _ in self._scorer.text_log_likelihoods([(context, each) for each in texts])]
        return scores[0] if single else scores

    def inspect(self, text: str, **options: Any) -> "Inspection":
        """Return what is inside the layers for one text; options as for `tm.inspect`.

        Raises:
            ValueError: `text` is not one text, or as for `tm.inspect`.
        """
        from transmamba_jax.evaluate.inspection import inspect

        if not isinstance(text, str):
            raise ValueError(f"text must be one text, found {_describe(text)}; tm.inspect takes tokens [B, T]")
        (text,), tokenizer = self._texts(text, "text"), self._known_tokenizer()
        tokens = tokenizer.encode(text) or [tokenizer.end_of_document]
        return inspect(self.model, self.params, jnp.array([tokens], jnp.int32), **options)

    def __repr__(self) -> str:
        """Return a few lines: where it comes from, its sizes and its schedule."""
        config, leaves = self.config.model, jax.tree.leaves(self.params)
        points = schedule.expand(config.transpoints, config.num_layers)
        tokenizer = "no tokenizer" if self.tokenizer is None else f"tokenizer of {self.tokenizer.vocab_size:,} ids"
        return (
            f"LanguageModel of {self.source}\n"
            f"  {sum(leaf.size for leaf in leaves):,} parameters in {len(leaves)} arrays, {tokenizer}\n"
            f"  {config.num_layers} layers, d_model {config.d_model}, TransPoints {_shorten(points)}"
        )

    @functools.cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.model, self.params, vocab_size=self._known_tokenizer().vocab_size)

    @functools.cached_property
    def _scorer(self) -> "Scorer":
        from transmamba_jax.evaluate.scoring import Scorer

        length, chunk = self.config.data.seq_len, self.config.train.loss_chunk
        return Scorer(self.model, self.params, self._known_tokenizer(), length, loss_chunk=chunk)

    def _known_tokenizer(self) -> data.Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.source} has no tokenizer, so text cannot be read; "
                "tm.generate(lm.model, lm.params, prompts) takes token ids"
            )
        return self.tokenizer

    def _texts(self, value: Any, name: str) -> list[str]:
        """Return the texts that an argument holds.

        Raises:
            ValueError: it is neither a text nor a sequence of texts, or a text has a part of a surrogate pair.
        """
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, Sequence) or isinstance(texts, bytes | bytearray):
            raise ValueError(f"{name} must be a text or a list of texts, found {_describe(value)}")
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(
                    f"{name} must be a text or a list of texts, found {_describe(text)}; "
                    "tm.generate(lm.model, lm.params, prompts) takes token ids"
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name} must be text in UTF-8, found {text[error.start]!r} in it") from None
        return list(texts)

    def _pieces(
        self,
        texts: list[str],
        max_new_tokens: int,
        sampling: Sampling,
        key: jax.Array | None,
        stop: str | Sequence[str],
        block: int,
    ) -> Iterator[list[str]]:
        tokenizer, decoder = self._known_tokenizer(), self._decoder
        prompts = [tokenizer.encode(text) or [tokenizer.end_of_document] for text in texts]
        key = jax.random.key(0) if key is None else key
        options: Any = {"stop": self._texts(stop, "stop"), "block": block}
        return stream_text(decoder, tokenizer, prompts, max_new_tokens, sampling, key, **options)


def load(path: str | os.PathLike[str], step: int | None = None) -> LanguageModel:
    """Load a trained model with its tokenizer; of a checkpoint, the parameters alone are read.

    Args:
        path: a run (a work directory), its folder of checkpoints, one step of it, or an exported folder.
        step: step of the checkpoint; None: the newest that passes verification.

    Returns:
        The model on the devices of this process; `lm.generate("def main(", max_new_tokens=64)` continues a text.

    Raises:
        ValueError: there is no such path, it holds none of these, the step is not there, or the checkpoint is damaged.
    """
    folder = paths.expand_path(path)
    if not folder.exists():
        raise ValueError(f"there is no {folder}; {_nearest(folder)}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a run, a folder of checkpoints or an exported folder")
    if (folder / tensor_files.FILE).exists() or (folder / tensor_files.INDEX).exists():
        return _load_exported(folder, step)
    return _load_checkpoint(folder, step)


def _load_exported(folder: Path, step: int | None) -> LanguageModel:
    from transmamba_jax import export

    if step is not None:
        raise ValueError(f"step={step} names a step of a run, and {folder} is an exported folder, which has none")
    if (folder / "config.json").exists() and not (folder / export.CONFIG).exists():
        raise ValueError(
            f"{folder} holds Mamba-2 weights; python -m transmamba_jax.convert from-mamba2 {folder} FOLDER makes an "
            "exported folder of them"
        )
    loaded = export.load(folder)
    model = _model(loaded.config.model)
    return LanguageModel(model, loaded.params, loaded.tokenizer, loaded.config, str(folder))


def _load_checkpoint(folder: Path, step: int | None) -> LanguageModel:
    from transmamba_jax import checkpoint
    from transmamba_jax.checkpoint import command_options

    directory = folder
    if (folder / "checkpoints").is_dir():
        directory = folder / "checkpoints"
    elif folder.name.isdecimal() and int(folder.name) in checkpoint.complete_steps(folder.parent):
        if step not in (None, int(folder.name)):
            raise ValueError(f"step={step} is not the step of {folder}; give {folder.parent}")
        directory, step = folder.parent, int(folder.name)
    if not checkpoint.complete_steps(directory):
        raise ValueError(
            f"{folder} must be a run, a folder of checkpoints or an exported folder: there is no complete checkpoint "
            f"in it; {_nearest(directory)}"
        )
    saved = checkpoint.restore(directory, step, params_only=True)
    command_options.require_plain(saved.config, directory)
    tokenizer = data.tokenizer_from_json(saved.tokenizer_json)
    model = _model(saved.config.model)
    return LanguageModel(model, saved.params, tokenizer, saved.config, f"{directory}, step {saved.step}")


def _model(config: ModelConfig) -> TransMamba:
    """Make the model with the kernels of this device's calibration record, where there is one."""
    return TransMamba(config, calibration.kernels(config, KernelsConfig(), "read"))


def _nearest(path: Path) -> str:
    """List the nearest folder above a path that is there."""
    if storage.is_remote(path):
        return "no object has a name below it"
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    names = sorted(paths.show_path(entry.name) + "/" * entry.is_dir() for entry in folder.iterdir())
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return f"{folder} holds {shown or 'nothing'}"


def _shorten(points: Sequence[int]) -> str:
    shown = [str(point) for point in points[:_SHOWN]]
    return ", ".join([*shown, "..."] if len(points) > _SHOWN else shown)


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:60]
