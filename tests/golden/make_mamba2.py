"""Write the golden folders of convert/test_convert.py: small Mamba-2 models of transformers, their logits.

    python tests/golden/make_mamba2.py      in an environment with torch 2.13, transformers 5.23 and safetensors 0.8

Every tensor is random, those too that transformers starts with constants, so that a wrong mapping shows.
"""

import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

FOLDER = Path(__file__).parent / "mamba2"
ROWS, LENGTH = 2, 37

COMMON = {"vocab_size": 24, "hidden_size": 12, "num_hidden_layers": 2, "chunk_size": 16, "head_dim": 4}
CASES = {
    # Fewer groups than heads, tied, no limits: what most published models look like.
    "tied": {"num_heads": 6, "n_groups": 2, "state_size": 6, "tie_word_embeddings": True},
    # Limits that bite at both ends, no biases, another width of the convolution; in several files.
    "limited": {
        "num_heads": 9,
        "expand": 3,
        "n_groups": 1,
        "state_size": 8,
        "time_step_limit": (0.05, 0.4),
        "use_conv_bias": False,
        "conv_kernel": 3,
        "layer_norm_epsilon": 1e-3,
    },
    # A group for every head, stored in bfloat16 (torch computes in float32).
    "bfloat16": {"num_heads": 6, "n_groups": 6, "state_size": 4, "residual_in_fp32": False},
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            tensor.data = 1 + 0.3 * noise
        elif name.endswith("A_log"):
            tensor.data = math.log(4) + noise
        elif name.endswith("dt_bias"):
            tensor.data = -2 + 1.5 * noise
        elif name.endswith("embeddings.weight"):
            tensor.data = noise
        elif name.endswith("conv1d.weight"):
            tensor.data = 0.5 * noise
        elif name.endswith("conv1d.bias"):
            tensor.data = 0.2 * noise
        else:
            tensor.data = noise / math.sqrt(tensor.shape[-1])


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for seed, (name, options) in enumerate(CASES.items()):
        model = Mamba2ForCausalLM(Mamba2Config(**COMMON, **options)).eval()
        randomise(model, seed)
        if name == "bfloat16":
            model = model.to(torch.bfloat16)
        model.save_pretrained(FOLDER / name, max_shard_size="8KB" if name == "limited" else "1GB")
        (FOLDER / name / "generation_config.json").unlink()
        tokens = np.random.default_rng(seed).integers(0, COMMON["vocab_size"], (ROWS, LENGTH), dtype=np.int32)
        with torch.no_grad():
            logits = model.float()(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
        save_file({"tokens": tokens, "logits": np.ascontiguousarray(logits)}, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    main()
