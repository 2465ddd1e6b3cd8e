"""Make a document of the fields of a row: its text, a prompt with its completion, or a chat."""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transmamba_jax.config import DataConfig
from transmamba_jax.data.documents import CompletionDocument, looks_like

_SHOWN = 40
"""Characters of a wrong value that a message shows."""

Segment = tuple[str, bool]
"""A text, and whether it is trained on."""


class RowError(ValueError):
    """A row that no document can be made of; the message follows the name of the row."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of the fields that a document is made of; see `DataConfig`."""

    text: str
    prompt: str | None
    completion: str | None
    messages: str | None
    template: str

    @classmethod
    def of(cls, config: DataConfig) -> "Fields":
        """Return those of a config."""
        return cls(
            config.text_field, config.prompt_field, config.completion_field, config.messages_field, config.chat_template
        )

    @property
    def options(self) -> dict[str, str]:
        """Return option -> name of the field, of the fields that are read."""
        if self.messages is not None:
            return {"data.messages_field": self.messages}
        if self.prompt is not None and self.completion is not None:
            return {"data.prompt_field": self.prompt, "data.completion_field": self.completion}
        return {"data.text_field": self.text}

    @property
    def names(self) -> list[str]:
        """Return the names of the fields that are read."""
        return list(dict.fromkeys(self.options.values()))

    @property
    def completions_only(self) -> bool:
        """Tell whether documents have parts that are not trained on."""
        return self.prompt is not None or self.messages is not None

    def require(self, found: Sequence[str]) -> None:
        """Refuse rows without the fields that are read.

        Raises:
            RowError: the message has the fields that exist, and the nearest.
        """
        for option, name in self.options.items():
            if name not in found:
                near = difflib.get_close_matches(name, found, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise RowError(f"has no field {name!r} ({option}), its fields are {', '.join(found) or 'none'}{hint}")
            if list(found).count(name) > 1:
                raise RowError(f"has several fields {name!r} ({option}); rename all but one")

    def document(self, row: Any) -> bytes:
        """Return the document of a row, UTF-8; one with a completion or a chat is a `CompletionDocument`.

        Raises:
            RowError: the row is no mapping, a field is missing or of another type, or a text is no Unicode.
        """
        if not isinstance(row, Mapping):
            raise RowError(f"must be an object with fields, found {_shown(row)}")
        if not self.completions_only:
            return _encode(self.text, self._text(row, self.text))
        if self.messages is None:
            segments = [(self._text(row, name), name == self.completion) for name in self.names]
        else:
            self.require(list(row))
            segments = _chat(self.messages, row[self.messages], self.template)
        where = " and ".join(self.names)
        return CompletionDocument.of([(_encode(where, text), learned) for text, learned in segments])

    def kept(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the document of a valid row is made of: of a message its role and its content."""
        found = {name: row[name] for name in self.names}
        if self.messages is not None:
            found[self.messages] = [{key: each[key] for key in ("role", "content")} for each in row[self.messages]]
        return found

    def _text(self, row: Mapping[str, Any], name: str) -> str:
        text = row.get(name)
        if isinstance(text, str):
            return text
        self.require(list(row))
        raise RowError(f"must have text in the field {name!r}, found {_shown(text)}")


def parse_json(line: bytes) -> Any:
    """Return the row that a line of JSON spells.

    Raises:
        RowError: the line is not JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = looks_like(line) or "; each line must be an object of its own"
        raise RowError(f"is not JSON: {error}{hint}") from None


def _chat(name: str, messages: Any, template: str) -> list[Segment]:
    """Return the segments of a chat; the assistant's words and what ends them are trained on."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RowError(f"must have a list of messages in the field {name!r}, found {_shown(messages)}")
    segments = list[Segment]()
    for number, message in enumerate(messages):
        role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(f"must have a text as role and as content of {name}[{number}], found {_shown(message)}")
        segments += _message(role, content, template)
    if not any(learned for _, learned in segments):
        raise RowError(f"has no message of the role assistant in the field {name!r}: nothing to train on")
    return segments


def _message(role: str, content: str, template: str) -> list[Segment]:
    learned = role == "assistant"
    if template == "chatml":
        return [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>\n", learned)]
    return [(f"{role.capitalize()}: ", False), (f"{content}\n", learned)]


def _encode(name: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"has no Unicode text in the field {name!r}: {error.reason} at {error.start}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"
