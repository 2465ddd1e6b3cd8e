"""Generation and scoring over simulated devices give what one device gives, and each device holds its part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CODE = r"""
import json
import warnings

warnings.simplefilter("error")  # such as a donated buffer that does not fit its result
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import transmamba_jax as tm
from tests.generate.decoding import random_params
from transmamba_jax import data, sharding
from transmamba_jax.evaluate import scoring
from transmamba_jax.runtime import serving_mesh
from transmamba_jax.config import MeshConfig, ModelConfig
from transmamba_jax.generate import Sampling

config = ModelConfig(vocab_size=256, num_layers=1, d_model=16, num_heads=4, num_groups=2, head_dim=4, state_dim=4,
                     mlp_dim=16, transpoints=(8,), dtype="float32")
model = tm.TransMamba(config, tm.KernelsConfig(ssd="reference"))
params = random_params(config)
prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [9], [2, 6, 5, 3, 5, 8], [1, 2]]
placed = lambda mesh: jax.device_put(params, sharding.parameter_shardings(params, mesh))
four = sharding.make_mesh(MeshConfig(1, 2, 1, 2), jax.devices()[:4])
eight = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
# Whole copies, as tm.restore makes them; and the mesh of a training run that cuts its rows, in whose middle it samples.
everywhere = jax.device_put(params, NamedSharding(Mesh(np.array(jax.devices()), ("devices",)), P()))

def run(params):
    # A piece from nothing, one after others with the TransPoint inside, and tokens with rows before and after it.
    decoder = tm.Decoder(model, params)
    state = decoder.prefill(prompts, prefill_chunk_size=5, total=13)
    part = max(shard.data.size / leaf.size for leaf in jax.tree.leaves(state.cache.layers)
               for shard in leaf.addressable_shards)
    tokens, state = decoder.decode(state, 3, total=13)
    again, _ = decoder.decode(state.rows([0, 0]), 1, Sampling(temperature=1.0), jax.random.key(0))
    found = {"tokens": tokens, "again": again, "logits": np.asarray(state.logits)}
    return {"part": part, **{name: array.tolist() for name, array in found.items()}}

def score(params):
    return scoring.Scorer(model, params, data.load_tokenizer("bytes"), 16).log_likelihoods([([1, 2, 3], [4, 5])] * 8)

report = {"one": run(params), "four": run(placed(four)), "scores": [score(params), score(everywhere)]}
with jax.set_mesh(eight):
    report["training"] = run(placed(eight))
pair = Mesh(np.array(jax.devices()[:2]), ("x",))  # somebody else's axes, one parameter cut along them
other = jax.device_put(params, {name: jax.tree.map(lambda _: NamedSharding(pair, P()), tree) if name != "embedding"
                                else NamedSharding(pair, P("x")) for name, tree in params.items()})
meshes = {"everywhere": everywhere, "training": placed(eight), "other": other}
report["axes"] = {name: list(serving_mesh.place(tree)[1].shape.values()) for name, tree in meshes.items()}
try:
    serving_mesh.place(placed(four) | {"embedding": placed(eight)["embedding"]})
except ValueError as error:
    report["error"] = str(error)
print(json.dumps(report))
"""


@pytest.mark.slow
def test_a_mesh_gives_the_tokens_of_one_device() -> None:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    options = {"cwd": Path(__file__).parents[2], "env": environment, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-c", CODE], check=False, **options)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    one = report["one"]
    assert one["part"] == 1
    for name, part in (("four", 1 / 2), ("training", 1 / 4)):
        found = report[name]
        assert found["tokens"] == one["tokens"], name
        assert found["again"] == one["again"], name
        np.testing.assert_allclose(found["logits"], one["logits"], rtol=1e-5, atol=1e-5)
        assert found["part"] == part, name  # windows are whole along tensor; rows are in 2 and in 4 parts
    np.testing.assert_allclose(report["scores"][1], report["scores"][0], rtol=1e-5)
    assert report["axes"] == {"everywhere": [8, 1, 1, 1], "training": [1, 4, 1, 2], "other": [1, 2, 1, 1]}
    assert report["error"].startswith("params must be placed on one mesh, found them on 2: ")
