"""Accuracy on the answers of synthetic tasks: tokens and whole answers, by place of question and fact.

An answer is right when each of its tokens is the model's most likely one, given the right tokens before it.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int


@dataclasses.dataclass(frozen=True)
class AnswerResult:
    """Accuracies over held-out rows of a task; every entry of a table is [start, stop, accuracy, answers]."""

    tokens: float
    """Share of answer tokens that are right."""
    answers: float
    """Share of answers that are right."""
    count: int
    """Answers that were asked for."""
    by_query: list[list[float]]
    """By the position of the token that the answer follows."""
    by_fact: list[list[float]]
    """By the position of the fact."""
    by_distance: list[list[float]]
    """By the tokens from the fact to the answer."""
    by_transpoint: list[list[float | None]]
    """[P, fact and question before P, fact before and question from P on, both from P on]; None: no such answer."""

    def metrics(self) -> dict[str, Any]:
        """Return the values of an evaluation line of metrics.jsonl."""
        return {
            "eval/accuracy": self.tokens,
            "eval/answers": self.answers,
            "eval/answers_count": self.count,
            **{f"eval/answers_{name}": getattr(self, name) for name in ("by_query", "by_fact", "by_distance")},
            "eval/answers_by_transpoint": self.by_transpoint,
        }


class AnswerCounter:
    """Collects the answers of batches."""

    def __init__(self) -> None:
        self._tokens = np.zeros(2, np.int64)  # right, all
        self._answers: list[np.ndarray] = []  # [n, 3]: right, position of the question, position of the fact

    def add(
        self, right: Bool[np.ndarray, "B T"], answers: Int[np.ndarray, "B T+1"], facts: Int[np.ndarray, "B T+1"]
    ) -> None:
        """Add a batch: whether each next token was predicted, and the rows' `answers` and `facts`."""
        numbers, places = answers[:, 1:], facts[:, 1:]
        self._tokens += [int(np.sum(right & (numbers > 0))), int(np.sum(numbers > 0))]
        row, time = np.nonzero(numbers)
        if not len(row):
            return
        # Answers are contiguous: one begins where the row or the number changes.
        number = numbers[row, time]
        begins = np.flatnonzero(np.r_[True, (row[1:] != row[:-1]) | (number[1:] != number[:-1])])
        correct = np.minimum.reduceat(right[row, time].astype(np.int64), begins)
        self._answers.append(np.stack([correct, time[begins], places[row, time][begins]], axis=1))

    def result(self, seq_len: int, transpoints: Sequence[int]) -> AnswerResult:
        """Return the accuracies.

        Raises:
            ValueError: no row had an answer.
        """
        if not self._answers:
            raise ValueError("no held-out row has an answer; read more rows (eval.windows)")
        right, query, fact = np.concatenate(self._answers).T
        edges = [0]
        while edges[-1] <= seq_len:
            edges.append(max(1, 2 * edges[-1]))

        def table(places: np.ndarray) -> list[list[float]]:
            rows = []
            for start, stop in itertools.pairwise(edges):
                inside = right[(places >= start) & (places < stop)]
                if len(inside):
                    rows.append([start, stop, float(inside.mean()), len(inside)])
            return rows

        def mean(mask: np.ndarray) -> float | None:
            return float(right[mask].mean()) if mask.any() else None

        return AnswerResult(
            tokens=float(self._tokens[0] / self._tokens[1]),
            answers=float(right.mean()),
            count=len(right),
            by_query=table(query),
            by_fact=table(fact),
            by_distance=table(query + 1 - fact),
            by_transpoint=[
                [point, mean(query < point), mean((fact < point) & (query >= point)), mean(fact >= point)]
                for point in sorted(set(transpoints))
            ],
        )
