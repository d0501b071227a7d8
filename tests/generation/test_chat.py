"""Chats, beside what transformers makes of them with templates of the kinds that there are."""

import functools
import itertools
import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jdsi import Chat
from jdsi.errors import PromptError
from jdsi.generation.prompts import as_list, encode

# Tools and calls as JSON, thinking, and parts of a message where it has them, as in Qwen's.
CHATML = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for document in documents or [] %}[{{ document.title }}: {{ document.text }}]
{% endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content or [] %}{{ part.text }}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""
# Content is trimmed, which makes a string of anything, as in Llama 3's.
LLAMA = """\
{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>

{% if 'tool_calls' in message %}{{ message['tool_calls'][0]['function']['arguments'] | tojson }}
{%- else %}{{ message['content'] | trim }}{% endif %}<|eot|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>

{% endif %}"""
# Text is added up, and roles must alternate, as in Mistral's.
MISTRAL = """\
{{ bos_token }}{% for message in messages if message.role != 'tool' %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message.role == 'user' %}{{ '[INST]' + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined %}[CALL]{{ message.tool_calls | tojson }}{{ eos_token }}
{%- else %}{{ message.content + eos_token }}{% endif %}{% endfor %}
{%- for message in messages if message.role == 'tool' %}[RESULT]{{ message.content | tojson }}{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL}

USER = {"role": "user", "content": " How warm is it in Köln? "}
ANSWER = {"role": "assistant", "content": "I do not know"}
CALL = {"function": {"name": "temperature", "arguments": {"city": "Köln"}}, "type": "function", "id": "c"}
TEMPERATURE = {"type": "function", "function": {"name": "temperature", "parameters": {"type": "object"}}}


def temperature(city: str) -> float:
    """Measures.

    Args:
        city: Where.
    """
    return len(city)


@functools.cache
def tokenizer(*names: str, **named: str) -> Any:
    """Bytes as tokens, with one of the templates, or some under names."""
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet(), 2)}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = {key: TEMPLATES[n] for key, n in named.items()} or "".join(TEMPLATES[n] for n in names) or None
    return made


def ids_of(prompt: Any, made: Any, name: str = "prompt") -> list[int]:
    (one,) = as_list(prompt)
    return encode(one, made, 300, name=name)


def transformers_ids(made: Any, messages: Any, **options: Any) -> list[int]:
    options = {"add_generation_prompt": True} | options
    return list(made.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def test_messages_of_every_kind_are_what_transformers_makes_of_them():
    call = {"role": "assistant", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "7.5", "name": "temperature"}
    listed = {"role": "tool", "content": [1, {"type": "warm"}]}
    chats = [
        [USER],
        [USER, ANSWER, USER],
        [USER, ANSWER],  # and yet another turn of the assistant's is opened
        [USER, call, result],
        [USER, call | {"content": None}, result],
        [USER, ANSWER | {"reasoning_content": "hm", "tool_calls": None}],
    ]
    for name, messages in itertools.product(TEMPLATES, chats):
        expected = transformers_ids(tokenizer(name), messages)
        assert ids_of(messages, tokenizer(name)) == ids_of(Chat(messages), tokenizer(name)) == expected
        assert "None" not in tokenizer(name).decode(expected)
    for name in ("llama", "mistral"):
        messages = [USER, call, listed]
        assert ids_of(messages, tokenizer(name)) == transformers_ids(tokenizer(name), messages)
    chatml = tokenizer("chatml")
    thinking = {"role": "assistant", "reasoning_content": "hm"}
    assert ids_of([USER, thinking], chatml) == transformers_ids(chatml, [USER, thinking])
    assert as_list([Chat([USER]), "a"]) == [Chat([USER]), "a"]


def test_options_of_a_chat_reach_the_template():
    documents = [{"title": "Wetter", "text": "warm"}]
    options = [
        {"tools": [TEMPERATURE]},
        {"tools": [temperature]},
        {"tools": []},
        {"documents": documents},
        {"add_generation_prompt": False},
        {"variables": {"enable_thinking": False}},
        {"chat_template": "{{ bos_token }}{{ x is none }}", "variables": {"bos_token": "BOS", "x": None}},
        {"chat_template": "{{ messages | length }}{{ bos_token }}"},
    ]
    seen = set()
    for given in options:
        plain = {key: value for key, value in given.items() if key != "variables"} | given.get("variables", {})
        found = ids_of(Chat([USER, ANSWER], **given), tokenizer("chatml"))
        assert found == transformers_ids(tokenizer("chatml"), [USER, ANSWER], **plain)
        seen.add(tuple(found))
    assert len(seen) == len(options)
    options = [{"chat_template": "rag"}, {}, {"tools": [TEMPERATURE]}]
    several = tokenizer(default="llama", tool_use="chatml", rag="mistral")
    for given in options:
        assert ids_of(Chat([USER], **given), several) == transformers_ids(several, [USER], **given)
    bare = tokenizer()
    assert ids_of(Chat([USER], chat_template=LLAMA), bare) == transformers_ids(bare, [USER], chat_template=LLAMA)


def test_the_final_message_is_continued():
    for name in TEMPLATES:
        made = tokenizer(name)
        found = ids_of(Chat([USER, ANSWER], continue_final_message=True), made)
        assert found == transformers_ids(made, [USER, ANSWER], continue_final_message=True, add_generation_prompt=False)
        assert made.decode(found).endswith("I do not know")
    thinking, made = ANSWER | {"reasoning_content": "Let me see"}, tokenizer("chatml")
    assert made.decode(ids_of(Chat([USER, thinking], continue_final_message="reasoning_content"), made)).endswith("see")


def test_content_in_parts_reaches_templates_that_take_them_and_is_joined_for_others():
    def in_parts(message: dict[str, Any]) -> dict[str, Any]:
        head, tail = message["content"][:5], message["content"][5:]
        return message | {"content": ({"type": "text", "text": head}, {"type": "text", "text": tail})}

    for name in TEMPLATES:
        made = tokenizer(name)
        chat = [in_parts(USER), ANSWER, in_parts(USER)]
        assert ids_of(chat, made) == transformers_ids(made, [USER, ANSWER, USER])
        continued = Chat([in_parts(USER), in_parts(ANSWER)], continue_final_message=True)
        assert ids_of(continued, made) == ids_of(Chat([USER, ANSWER], continue_final_message=True), made)
        nothing = ids_of([USER | {"content": []}, ANSWER], made)
        assert nothing == transformers_ids(made, [USER | {"content": ""}, ANSWER])
    takes = "{% for m in messages %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endfor %}"
    assert tokenizer().decode(ids_of(Chat([in_parts(USER)], chat_template=takes), tokenizer())) == (
        "< How ><warm is it in Köln? >"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": [{"content": "a"}]}, r"^chat 3 has a message with keys \['content'\]; each needs 'role'"),
        ({"messages": [{"role": "user"}]}, r"^chat 3 has a message with keys \['role'\]; .* 'content' or 'tool_calls'"),
        ({"messages": [{"role": "user", "content": None}]}, r"keys \['content', 'role'\]"),
        ({"messages": ["a"]}, "^chat 3 has a message of type str"),
        ({"messages": [USER, USER]}, "^chat 3 is a chat that .* template refuses: roles must alternate"),
        ({"tools": ["temperature"]}, "^chat 3 is a chat .* refuses: Tools should"),
        ({"tools": [lambda city: 1]}, "^chat 3 is a chat .* refuses"),
        ({"documents": ["text"]}, "^chat 3 is a chat .* refuses: Documents should"),
        (
            {"messages": [USER | {"content": ["a"]}]},
            "^chat 3 has a message with a content part of Python type str; it m",
        ),
        ({"messages": [USER | {"content": [{"type": "image", "url": "x"}]}]}, "chat 3 .* content part of type 'image'"),
        ({"messages": [USER | {"content": [{"text": "x"}]}]}, "chat 3 .* content part of type None"),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "chat 3 .* content part whose text is None"),
        ({"continue_final_message": "thinking"}, "^chat 3 is a chat .* refuses: .*thinking"),
        (
            {"chat_template": "tool_user"},
            r"^chat 3 .* template 'tool_user' \(did you mean 'tool_use'\?\); .* default, tool",
        ),
        ({"chat_template": "{% if %}"}, "^chat 3 is a chat .* refuses"),
        ({"variables": {"tokenize": True}}, "^chat 3 has a template variable 'tokenize'; that name is not free"),
        ({"variables": {"messages": []}}, "^chat 3 has a template variable 'messages'"),
    ],
)
def test_a_chat_that_is_incomplete_or_refused_is_named(options: dict[str, Any], message: str):
    made = tokenizer(default="mistral", tool_use="mistral")
    with pytest.raises(PromptError, match=message):
        ids_of(Chat(**{"messages": [USER], **options}), made, "chat 3")


def test_a_name_is_no_template_where_there_is_one_without_a_name():
    with pytest.raises(PromptError, match="prompt asks for chat template 'tool_use'; the tokenizer names none"):
        ids_of(Chat([USER], chat_template="tool_use"), tokenizer("llama"))
    with pytest.raises(PromptError, match="prompt is a chat, and this model's tokenizer has no chat template"):
        ids_of(Chat([USER]), tokenizer())
    with pytest.raises(PromptError, match="prompt is a chat, and the model came without a tokenizer"):
        ids_of(Chat([USER]), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": "a"}, "messages is of type str; it must be a list of messages"),
        ({"messages": []}, "has no messages"),
        ({}, "has no messages"),
        ({"messages": [USER], "tools": "a"}, "tools is of type str; it must be a list of JSON schemas"),
        ({"messages": [USER], "add_generation_prompt": 1}, "add_generation_prompt is of type int"),
        ({"messages": [USER], "variables": []}, "variables is of type list"),
        ({"messages": [USER], "tool": [], "x": 1}, r"no 'tool' \(did you mean 'tools'\?\), 'x'; valid are messages, t"),
        (
            {"messages": [USER], "add_generation_prompt": True, "continue_final_message": True},
            "leave out add_generation_prompt or continue_final_message",
        ),
    ],
)
def test_fields_of_a_chat_are_checked(options: dict[str, Any], message: str):
    with pytest.raises(PromptError, match=message):
        Chat.from_dict(options)
    with pytest.raises(PromptError, match=message):
        Chat.from_dict(json.loads(json.dumps(options)))
