"""The lm-evaluation-harness with a checkpoint of this package; needs the extra `eval`.

    python -m transmamba_jax.evaluate.lm_eval_adapter run --model transmamba --tasks NAME \\
        --model_args checkpoint=runs/tiny/checkpoints,schedule=v7,max_length=256 --batch_size 8

is the harness's own command line with this model added. In Python, give `lm_eval.simple_evaluate` a `TransMambaLM`.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string

from transmamba_jax.evaluate import scoring
from transmamba_jax.evaluate.scoring import Scorer
from transmamba_jax.generate.sampling import Sampling

_NUMBERS = ("step", "max_length", "max_gen_toks", "batch_size", "seed")
_CHOICES = ("top_k", "top_p", "min_p", "repetition_penalty")
_KNOWN = {"do_sample", "temperature", "until", "max_gen_toks", *_CHOICES}

_Options = tuple[list[str], int, Sampling]


class RefusedError(ValueError):
    """A request of the command line or of a task that cannot be met; the message is for its author."""


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Tell what this package refuses from what goes wrong inside the harness."""
    try:
        yield
    except ValueError as error:
        raise RefusedError(str(error)) from error


@register_model("transmamba")
class TransMambaLM(TemplateLM):
    """Hand the harness's requests to a `Scorer`.

    A context and its continuation become tokens as for the harness's own models: see `scoring.encode_pair`.
    """

    tokenizer_name = "transmamba"

    def __init__(self, scorer: Scorer, max_gen_toks: int | None = None) -> None:
        """Take a scorer; `max_gen_toks`: tokens where a task does not say; None: 256, or half of max_length."""
        super().__init__()
        self.scorer = scorer
        self.max_gen_toks = min(256, scorer.max_length // 2) if max_gen_toks is None else max_gen_toks

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "TransMambaLM":
        """Load what --model_args names; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "TransMambaLM":
        """Load a checkpoint.

        Args:
            arg_dict: checkpoint, and if wanted step, schedule, max_length, max_gen_toks, batch_size and seed.
            additional_config: batch_size; the harness's device is PyTorch's and means nothing here, JAX has its own.

        Raises:
            RefusedError: an argument is unknown, or `scoring.load` refuses it.
        """
        with _refusals():
            return cls._create(arg_dict, additional_config or {})

    @classmethod
    def _create(cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any]) -> "TransMambaLM":
        given = {**additional_config, "device": None, **arg_dict}
        options = {name: value for name, value in given.items() if value is not None}
        if "checkpoint" not in options or not set(options) <= {"checkpoint", "schedule", *_NUMBERS}:
            raise ValueError(
                f"the model transmamba needs checkpoint=DIR and takes schedule, {', '.join(_NUMBERS)}; found "
                f"{', '.join(options) or 'nothing'}"
            )
        for name in options.keys() & set(_NUMBERS):
            if not str(options[name]).isdecimal():
                raise ValueError(f"{name} must be a whole number, found {options[name]!r}")
            options[name] = int(options[name])
        limit = {name: options.pop(name) for name in ("max_gen_toks",) if name in options}
        return cls(scoring.load(**options), **limit)

    @property
    def eot_token_id(self) -> int:
        """Token between documents, which also goes before a text without a context."""
        return self.scorer.tokenizer.end_of_document

    @property
    def max_length(self) -> int:
        """Tokens that the model may read in a row."""
        return self.scorer.max_length

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        """Refuse.

        Raises:
            RefusedError: always.
        """
        raise RefusedError("the model transmamba has no chat template; leave out --apply_chat_template")

    chat_template = apply_chat_template

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text; there are never special ones among them."""
        del add_special_tokens, kwargs
        return self.scorer.tokenizer.encode(scoring.well_formed(string))

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log p of each continuation and whether greedy decoding would give it."""
        del disable_tqdm
        return self.scorer.text_log_likelihoods([request.args for request in requests])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        del disable_tqdm
        return self.scorer.log_likelihoods([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text."""
        del disable_tqdm
        return self.scorer.document_log_likelihoods([self.tok_encode(request.args[0]) for request in requests])

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each text as its task says.

        Raises:
            RefusedError: a task asks for what this model has not.
        """
        del disable_tqdm
        with _refusals():
            return self._generate_until(requests)

    def _generate_until(self, requests: Sequence[Instance]) -> list[str]:
        groups: dict[str, tuple[_Options, list[int]]] = {}
        for index, request in enumerate(requests):
            options = _options(request.args[1], self.max_gen_toks)
            groups.setdefault(repr(options), (options, []))[1].append(index)
        answers = [""] * len(requests)
        for (until, max_tokens, sampling), places in groups.values():
            prompts = [requests[index].args[0] for index in places]
            texts = self.scorer.continuations(prompts, until, max_tokens, sampling)
            for index, text in zip(places, texts, strict=True):
                answers[index] = text
        return answers


def _options(generation: Mapping[str, Any], max_gen_toks: int) -> _Options:
    """Read a task's generation_kwargs: what ends a text, tokens at most, sampling."""
    given = normalize_gen_kwargs({k: v for k, v in generation.items() if v is not None}, max_gen_toks)
    unknown = sorted(set(given) - _KNOWN)
    if unknown:
        raise ValueError(f"generation_kwargs has {', '.join(unknown)}; this model takes {', '.join(sorted(_KNOWN))}")
    choices = {name: given[name] for name in _CHOICES if name in given}
    if choices.get("top_k") in (0, -1):  # as transformers and vLLM write "all tokens"
        del choices["top_k"]
    temperature = float(given["temperature"]) if "temperature" in given else 1.0 if given["do_sample"] else 0.0
    return (
        [text for text in given["until"] if text],
        given["max_gen_toks"],
        Sampling(temperature=temperature, **choices),
    )


def main() -> int:
    """Run the harness's own command line; returns 2 where this package refuses what is asked for."""
    try:
        cli_evaluate()
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
