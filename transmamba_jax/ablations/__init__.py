"""Variants of the mixer for studies; `model.ablation` names them."""

from transmamba_jax.ablations.mixer import AblatedMixer

__all__ = ["AblatedMixer"]
