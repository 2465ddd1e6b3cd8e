"""The samples at the end of a run: excerpts of a text, each continued by the model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax import data
from transmamba_jax.config import Config
from transmamba_jax.generate import generate
from transmamba_jax.model import TransMamba
from transmamba_jax.runtime import hosts, serving_mesh
from transmamba_jax.training.step import TrainState

PROMPTS = 3
PROMPT_TOKENS = 64
TEMPERATURE = 0.8


def sample_text(
    config: Config, model: TransMamba, tokenizer: data.Tokenizer, state: TrainState, step: int
) -> str | None:
    """Continue excerpts of the held-out text (of the training text, where nothing is held out), spread evenly over it.

    Every process calls it. Of several the first one decodes, on its own devices with copies of the parameters, and the
    others get None: which program comes next depends on the tokens, and so few rows leave little to share out. Where
    memory does not suffice for the copies, it says so and returns None too.
    """
    key_data, kind = np.asarray(jax.random.key_data(state.key)), jax.random.key_impl(state.key)
    params, mesh = state.params, jax.sharding.get_mesh()
    try:
        if jax.process_count() > 1:
            found = serving_mesh.for_first(params)
            if found is None:
                return None
            params, mesh = found
        text = data.held_out_text(config.data) if config.eval.every else data.training_text(config.data, 2**12)
        prompts = [tokenizer.encode(piece)[:PROMPT_TOKENS] for piece in _pieces(text)]
        with jax.set_mesh(mesh):
            key = jax.random.fold_in(jax.random.wrap_key_data(jnp.array(key_data), impl=kind), step)
            options: Any = {"temperature": TEMPERATURE, "key": key, "vocab_size": tokenizer.vocab_size}
            rows = generate(model, params, prompts, config.train.sample_tokens, **options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        hosts.log_first(f"no sample: not enough memory for it beside the training state: {hosts.one_line(error)}")
        return None
    rest = f"temperature {TEMPERATURE}: up to {PROMPT_TOKENS} tokens of prompt, then the model's own"
    decoded = [(tokenizer.decode(prompt), tokenizer.decode(row)) for prompt, row in zip(prompts, rows, strict=True)]
    return "\n".join(
        [f"{_first_words(step)} {rest}", *(f"--- prompt\n{prompt}\n--- model\n{own}" for prompt, own in decoded), ""]
    )


def is_written(samples: Path, step: int) -> bool:
    """Tell whether a file has samples of `step`, and not those of a run that was shorter."""
    try:
        return samples.read_text(encoding="utf-8").startswith(_first_words(step))
    except (OSError, UnicodeDecodeError):
        return False


def _first_words(step: int) -> str:
    return f"step {step},"


def _pieces(text: bytes) -> list[str]:
    """Return excerpts of a text from `PROMPTS` positions, each from the beginning of a line that is near."""
    places = [index * len(text) // PROMPTS for index in range(PROMPTS)]
    starts = [text.rfind(b"\n", max(place - 2**10, 0), place) + 1 or place for place in places]
    pieces = [text[start : start + 2**12].lstrip(b"\0").partition(b"\0")[0] for start in starts]  # of one document
    return [piece.decode("utf-8", errors="ignore") or "\n" for piece in pieces]
