"""The progress line."""

import datetime

from transmamba_jax.runtime import logs
from transmamba_jax.training.console import Console

RECORD = {"loss": 2.0, "bits_per_byte": 1.0, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_second": 1234.0}


def test_the_end_is_estimated_from_all_that_the_steps_took(capsys):
    noon = datetime.datetime(2030, 5, 1, 12, 0).timestamp()
    times = iter([noon - 500.0, noon, noon + 600.0, noon + 900.0])
    with logs.shown(), Console(100, 400, clock=lambda: next(times)) as console:
        console.begin()
        console.report({"step": 200, **RECORD})  # 6 s a step, 200 steps left
        console.report({"step": 250, **RECORD})
        console.report({"step": 400, **RECORD})
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.endswith(
        "step 200/400  loss 2.0000  bits per byte 1.0000  gradient norm 0.500  learning rate 1.00e-03  "
        "1,234 tokens/s  ends about 2030-05-01 12:30"
    )
    assert second.endswith("ends about 2030-05-01 12:30")
    assert last.endswith("1,234 tokens/s")
