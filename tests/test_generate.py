"""Generation against the definition: take the forward's last logits, choose, append, again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests.test_model import make
from transmamba_jax.generate import keep_likely

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9]]


def test_greedy_equals_the_forward_token_by_token() -> None:
    model, params = make()
    forward = jax.jit(model.apply)
    for prompt, new in zip(PROMPTS, tm.generate(model, params, PROMPTS, max_new_tokens=9), strict=True):
        row = list(prompt)
        for _ in range(9):
            # Read at its own position in a longer row: what follows a token cannot change its logits.
            logits = forward({"params": params}, jnp.array([row + [0] * (18 - len(row))]))[0, len(row) - 1]
            row.append(int(jnp.argmax(logits)))
        assert new == row[len(prompt) :]


def test_sampling_is_reproducible_and_follows_the_key() -> None:
    model, params = make()
    draw = lambda seed: tm.generate(
        model, params, PROMPTS, max_new_tokens=12, temperature=1.5, key=jax.random.key(seed)
    )
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_samples_follow_the_models_distribution() -> None:
    model, params = make()
    prompt = PROMPTS[0]
    logits = model.apply({"params": params}, jnp.array([prompt]))[0, -1]
    probabilities = np.asarray(jax.nn.softmax(logits / 2))
    new = tm.generate(model, params, [prompt] * 2000, max_new_tokens=1, temperature=2.0, key=jax.random.key(3))
    counts = np.bincount(np.array(new)[:, 0], minlength=len(probabilities))
    deviation = (counts - 2000 * probabilities) / np.sqrt(2000 * probabilities * (1 - probabilities))
    assert np.abs(deviation).max() < 5


def test_one_likely_token_is_greedy() -> None:
    model, params = make()
    greedy = tm.generate(model, params, PROMPTS, max_new_tokens=5)
    for option in ({"top_k": 1}, {"top_p": 1e-6}):
        assert tm.generate(model, params, PROMPTS, 5, temperature=1.0, key=jax.random.key(0), **option) == greedy


def test_top_k_and_top_p_sets() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.1, 0.3, 0.06, 0.04]]))
    kept = lambda **options: np.isfinite(np.asarray(keep_likely(logits, **options)))[0].nonzero()[0].tolist()
    assert kept(top_k=2) == [0, 2]
    assert kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.45) == [0]
    assert kept(top_p=0.7) == [0, 2]
    assert kept(top_p=0.85) == [0, 1, 2]
    assert kept(top_p=1.0) == [0, 1, 2, 3, 4]


def test_no_new_tokens() -> None:
    model, params = make()
    assert tm.generate(model, params, PROMPTS, max_new_tokens=0) == [[], [], []]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[1, 50]]}, r"prompts\[0\] has token 50, outside the vocabulary 0..49"),
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, found -1"),
        ({"temperature": -0.5}, "temperature must be >= 0, found -0.5"),
        ({"temperature": float("nan")}, "temperature must be >= 0, found nan"),
        ({"temperature": 1.0}, "needs a random key"),
        ({"top_k": 0}, "top_k must be >= 1, found 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], found 0.0"),
    ],
)
def test_bad_options_are_refused(options, message: str) -> None:
    model, params = make()
    with pytest.raises(ValueError, match=message):
        tm.generate(model, params, **{"prompts": PROMPTS, **options})
