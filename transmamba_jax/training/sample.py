"""The sample at the end of a run: the beginning of a text, and what the model makes of it."""

import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax import data, hosts, serving_mesh
from transmamba_jax.config import Config
from transmamba_jax.generate import generate
from transmamba_jax.model import TransMamba
from transmamba_jax.training.step import TrainState

PROMPT_TOKENS = 64
TEMPERATURE = 0.8


def sample_text(
    config: Config, model: TransMamba, tokenizer: data.Tokenizer, state: TrainState, step: int
) -> str | None:
    """Continue the beginning of the held-out text (of the training text, where nothing is held out).

    Every process calls it. Of several the first one decodes, on its own devices with copies of the parameters, and the
    others get None: which program comes next depends on the tokens, and one row leaves nothing to share out. Where the
    copies find no room there, it says so and returns None too.
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
        prompt = tokenizer.encode(text[: 2**12].decode("utf-8", errors="ignore"))[:PROMPT_TOKENS]
        with jax.set_mesh(mesh):
            key = jax.random.fold_in(jax.random.wrap_key_data(jnp.array(key_data), impl=kind), step)
            (tokens,) = generate(model, params, [prompt], config.train.sample_tokens, temperature=TEMPERATURE, key=key)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        hosts.say(f"no sample: there is no room for it beside the training state: {hosts.one_line(error)}")
        return None
    heading = f"step {step}, temperature {TEMPERATURE}: {len(prompt)} tokens of prompt, then the model's own"
    return f"{heading}\n--- prompt\n{tokenizer.decode(prompt)}\n--- model\n{tokenizer.decode(tokens)}\n"
