"""Every way of damaging a checkpoint, each on a copy of one good folder."""

import contextlib
import dataclasses
import io
import json
import logging
import pickle
import shutil
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from transmamba_jax import checkpoint, config_io
from transmamba_jax.checkpoint import __main__ as checkpoint_command
from transmamba_jax.config import CheckpointConfig, Config

LARGE = "params/large"
FILES = {
    "structure": "params/_METADATA",
    "shardings": "params/_sharding",
    "shapes": "state/array_metadatas/process_0",
    "item marker": "config/commit_success.txt",
    "step marker": "commit_success.txt",
    "step metadata": "_CHECKPOINT_METADATA",
    "index": "params/manifest.ocdbt",
    "index node": "params/d/*",
    "process index": "state/ocdbt.process_0/manifest.ocdbt",
    "array": "params/ocdbt.process_0/d/*",
    "data iterator": "data/metadata",
    "config": "config/metadata",
    "tokenizer": "tokenizer/metadata",
    "manifest": "manifest.json",
}


@flax.struct.dataclass
class State:
    params: dict
    step: jax.Array


def make_state(step):
    rng = np.random.default_rng(step)
    params = {"large": rng.random((600, 1000), np.float32), "small": rng.random((3, 5), np.float32)}
    return State(jax.tree.map(jnp.asarray, params), jnp.int32(step))


def save(folder, *states):
    writer = checkpoint.Checkpointer(folder, CheckpointConfig())
    for step, state in states:
        writer.save(step, state, {"position": step}, config_io.to_yaml(Config()), "{}")
    writer.close()


def flip(file, where=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * where)] ^= 4
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def exchange(folder, state):
    """Put the parameters of another checkpoint into step 8."""
    save(folder / "other", (8, state))
    shutil.rmtree(folder / "8" / "params")
    (folder / "other" / "8" / "params").rename(folder / "8" / "params")
    shutil.rmtree(folder / "other")


def other_params(**params):
    state = make_state(8)
    return dataclasses.replace(state, params={**state.params, **params})


class Trap:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def pickles(folder):
    for place in (folder, folder / "8", folder / "8" / "params", folder / "8" / "data"):
        (place / "trap.pkl").write_bytes(pickle.dumps(Trap(folder.parent / "sprung")))
        (place / "metadata.pkl").write_bytes(pickle.dumps(Trap(folder.parent / "sprung")))


def cases():
    """Name -> function of the folder that does the damage."""
    found = {}
    for name, pattern in FILES.items():
        largest = lambda folder, pattern=pattern: max(
            (folder / "8").glob(pattern), key=lambda file: file.stat().st_size
        )
        found[f"flip {name}"] = lambda folder, largest=largest: flip(largest(folder))
        found[f"truncate {name}"] = lambda folder, largest=largest: truncate(largest(folder))
        found[f"delete {name}"] = lambda folder, largest=largest: largest(folder).unlink()
    arrays = FILES["array"]
    for place in (0.01, 0.3, 0.99):
        found[f"flip array at {place}"] = lambda folder, place=place: flip(
            max((folder / "8").glob(arrays), key=lambda file: file.stat().st_size), place
        )
    found["wrong values"] = lambda folder: exchange(folder, other_params(small=jnp.zeros((3, 5))))
    found["wrong dtype"] = lambda folder: exchange(folder, other_params(small=jnp.zeros((3, 5), jnp.bfloat16)))
    found["wrong shape"] = lambda folder: exchange(folder, other_params(small=jnp.zeros((5, 3))))
    found["missing leaf"] = lambda folder: exchange(
        folder, State({"large": make_state(8).params["large"]}, jnp.int32(8))
    )
    found["renamed step"] = lambda folder: (folder / "8").rename(folder / "9")
    found["nothing"] = lambda _: None
    found["pickles"] = pickles
    return found


def main(folder):
    """Write report.json: for each case the step that was restored, whether bit for bit, and what was said."""
    good = folder / "good"
    save(good, (3, make_state(3)), (8, make_state(8)))
    report = {}
    for name, harm in cases().items():
        hurt = folder / "hurt"
        shutil.copytree(good, hurt)
        harm(hurt)
        before = sorted(str(path) for path in hurt.rglob("*"))
        said = io.StringIO()
        handler = logging.StreamHandler(said)
        logging.getLogger("transmamba_jax").addHandler(handler)
        reader = checkpoint.Checkpointer(hurt, CheckpointConfig())
        restored = reader.restore_newest(make_state(0))
        reader.close()
        logging.getLogger("transmamba_jax").removeHandler(handler)
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), restored.state, make_state(restored.step))
        lines = [line for line in said.getvalue().splitlines() if line.startswith("checkpoint ")]
        by_hand = io.StringIO()
        with contextlib.redirect_stdout(by_hand):
            code = checkpoint_command.main(["verify", str(hurt)])
        report[name] = {
            "step": restored.step,
            "same": all(jax.tree.leaves(same)) and restored.data_state == {"position": restored.step},
            "lines": lines,
            "kept": before == sorted(str(path) for path in hurt.rglob("*")),
            "verify": [code, by_hand.getvalue()],
            "sprung": (folder / "sprung").exists(),
        }
        shutil.rmtree(hurt)
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return 0
