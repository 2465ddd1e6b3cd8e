"""Rows of another length than those of training, with TransPoints kept or scaled."""

import dataclasses

from transmamba_jax.config import Config


def with_length(config: Config, seq_len: int, scale_transpoints: bool) -> Config:
    """Return a config that reads rows of `seq_len` tokens.

    TransPoints are kept as numbers of tokens, or scaled by seq_len / data.seq_len. Kept, a layer that attended to the
    whole row hands the rest of a longer one to the SSM.
    """
    points = config.model.transpoints
    if scale_transpoints:
        points = tuple(point * seq_len // config.data.seq_len for point in points)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, transpoints=points),
        data=dataclasses.replace(config.data, seq_len=seq_len),
    )
