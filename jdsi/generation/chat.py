"""Chats: messages, and what a chat template is given beside them, to the text of a prompt."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from jdsi.errors import PromptError, nearest

_SAID = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")


@dataclasses.dataclass(frozen=True)
class Chat:
    """A prompt that goes through the model's chat template. Templates ignore what they do not know of.

    Attributes:
        messages: each with `role` and `content`, which is text or parts `{"type": "text", "text": ...}`; an assistant's
            may have `tool_calls` instead. What is `None` counts as left out. Parts are joined for a template that takes
            text alone.
        tools: functions that the model may call, as JSON schemas, or in Python with type hints and a docstring in
            Google's style.
        add_generation_prompt: whether the assistant's turn is opened at the end; by default it is, unless the final
            message is continued.
        continue_final_message: leaves the final message open for the model to go on with; the name of a field of it,
            such as `"reasoning_content"`, if that is not `content`.
        documents: for retrieval, as a rule with `title` and `text`.
        chat_template: the name of one of the tokenizer's templates, or a template in Jinja; by default the tokenizer's
            own, or of several that for tools, if there are any, or the default.
        variables: others that the template knows, such as `{"enable_thinking": False}`.

    Raises:
        PromptError: no messages, a field of another type, or both `add_generation_prompt` and `continue_final_message`.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | str = False
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check("messages", list | tuple, "a list of messages")
        self._check("tools", list | tuple | None, "a list of JSON schemas or functions, or None")
        self._check("add_generation_prompt", bool | None, "True, False or None")
        self._check("continue_final_message", bool | str, "True, False or the name of a field")
        self._check("documents", list | tuple | None, "a list of documents, or None")
        self._check("chat_template", str | None, "the name of a template, a template, or None")
        self._check("variables", Mapping, "a mapping")
        if not self.messages:
            raise PromptError("a chat has no messages; it needs at least one")
        if self.add_generation_prompt and self.continue_final_message:
            raise PromptError(
                "a chat cannot both continue its final message and open another: leave out add_generation_prompt or "
                "continue_final_message"
            )

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """A chat from a mapping; raises `PromptError` that names every unknown key and the nearest valid one."""
        valid = [field.name for field in dataclasses.fields(cls)]
        unknown = [f"{key!r}{nearest(str(key), valid)}" for key in options if key not in valid]
        if unknown:
            raise PromptError(f"a chat has no {', '.join(unknown)}; valid are {', '.join(valid)}")
        return cls(**{"messages": (), **options})

    def render(self, tokenizer: Any, name: str) -> str:
        """The text that the chat template makes.

        Args:
            tokenizer: a `transformers` tokenizer.
            name: what error messages call the prompt.

        Raises:
            PromptError: no such template, or a message without what it needs. What the template or `transformers`
                raises comes as it is.
        """
        self._check_template(tokenizer, name)
        self._check_variables(tokenizer, name)
        messages = [_plain(message, name) for message in self.messages]
        options = {
            "tools": self.tools and [dict(tool) if isinstance(tool, Mapping) else tool for tool in self.tools],
            "documents": self.documents and [dict(one) if isinstance(one, Mapping) else one for one in self.documents],
            "chat_template": self.chat_template,
            "tokenize": False,
            **self.variables,
        }
        options = {key: value for key, value in options.items() if value is not None or key in self.variables}
        if not _takes_parts(tokenizer, messages, options):
            messages = [m | {"content": _joined(m["content"])} if _in_parts(m) else m for m in messages]
        add = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add, continue_final_message=self.continue_final_message, **options
        )

    def _check(self, field: str, kind: Any, right: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, kind):
            raise PromptError(f"a chat's {field} is of type {type(value).__name__}; it must be {right}")

    def _check_template(self, tokenizer: Any, name: str) -> None:
        own = getattr(tokenizer, "chat_template", None)
        if self.chat_template is None:
            if not own:
                raise PromptError(
                    f"{name} is a chat, and this model's tokenizer has no chat template; give text instead"
                )
            return
        names = list(own) if isinstance(own, Mapping) else []
        # transformers would take a name that it does not know for a template, and for the prompt.
        if self.chat_template not in names and not any(mark in self.chat_template for mark in ("{{", "{%", "{#")):
            known = f"has {', '.join(names)}" if names else "names none"
            hint = nearest(self.chat_template, names)
            raise PromptError(f"{name} asks for chat template {self.chat_template!r}{hint}; the tokenizer {known}")

    def _check_variables(self, tokenizer: Any, name: str) -> None:
        taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
        for variable in self.variables:
            if variable in taken:
                raise PromptError(f"{name} has a template variable {variable!r}; that name is not free for one")


def _plain(message: Any, name: str) -> dict[str, Any]:
    """A message without the keys that are `None`, as newer transformers has it; templates may write `None` out."""
    if not isinstance(message, Mapping):
        raise PromptError(f"{name} has a message of type {type(message).__name__}; each must be a mapping")
    plain = {key: value for key, value in message.items() if value is not None}
    if "role" not in plain or not any(key in plain for key in _SAID):
        keys = sorted(map(str, message))
        raise PromptError(f"{name} has a message with keys {keys}; each needs 'role', and 'content' or 'tool_calls'")
    content = plain.get("content")
    if isinstance(content, list | tuple):
        plain["content"] = list(content) or ""
        if plain["role"] != "tool":  # there a list may be what a function returned
            for part in content:
                _check_part(part, name)
    return plain


def _check_part(part: Any, name: str) -> None:
    right = "it must be {'type': 'text', 'text': ...}, for the model takes nothing but text"
    if not isinstance(part, Mapping):
        raise PromptError(f"{name} has a message with a content part of Python type {type(part).__name__}; {right}")
    if part.get("type") != "text":
        raise PromptError(f"{name} has a message with a content part of type {part.get('type')!r}; {right}")
    if not isinstance(part.get("text"), str):
        raise PromptError(f"{name} has a message with a content part whose text is {part.get('text')!r}; {right}")


def _in_parts(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content)


def _joined(parts: Sequence[Mapping[str, Any]]) -> str:
    return "".join(str(part["text"]) for part in parts)


def _takes_parts(tokenizer: Any, messages: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> bool:
    """Whether the template neither fails at content in parts nor writes it out as a list in Python."""
    lists = [str(message["content"]) for message in messages if _in_parts(message)]
    if not lists:
        return True
    try:
        text = tokenizer.apply_chat_template(messages, **options)
    except Exception:  # of any type
        return False
    return not any(written in text for written in lists)
