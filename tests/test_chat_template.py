"""Chat templates: rendered as transformers renders them, and without anything that is not in the request."""

from __future__ import annotations

from typing import Any

import pytest

from isobatch.engine.chat_template import ChatTemplate
from isobatch.errors import PromptError, TokenizerError

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hi <b> 'é'"}, {"role": "assistant", "content": "Yes"}]


def _rendered(source: str, **special: str) -> str:
    return ChatTemplate(source, special).render(MESSAGES, add_generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "{{ bos_token }}{% for m in messages %}\n    {%- if loop.index0 == 1 %}{% break %}{% endif %}\n"
        "    {{ m['content'] | trim }}\n{% endfor %}\nend",
        "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ undefined_name }}",
        "{% if tools %}tools{% endif %}{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ messages[-1].content.split('e')[0] }}",
    ],
)
def test_templates_render_as_in_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template(
        [MESSAGES], None, None, source, add_generation_prompt=True, bos_token="<s>"
    )
    assert _rendered(source, bos_token="<s>") == expected


def test_templates_get_no_clock() -> None:
    guarded = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}26 Jul 2024{% endif %}"
    assert _rendered(guarded) == "26 Jul 2024"
    with pytest.raises(TokenizerError, match="puts the time into the prompt"):
        _rendered("{{ strftime_now('%Y') }}")


@pytest.mark.parametrize("source", ["{% if %}", "{{ [1, 2] | random }}", "{% generation %}", "{{ '"])
def test_templates_that_do_not_compile_are_refused(source: str) -> None:
    with pytest.raises(TokenizerError, match="does not compile"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['name'] + '!' }}", "name"),
        ("{{ messages[5]['content'] }}", "element 5"),
        ("{{ lipsum() }}", "lipsum"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_messages_that_a_template_refuses_are_refused(source: str, named: str) -> None:
    with pytest.raises(PromptError, match=named):
        _rendered(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.count }}",
        "{{ messages.count ~ '!' }}",
        "{{ messages.count | string }}",
        "{{ messages.count | string | upper }}",
        "{{ [1, [messages.count]] }}",
        "{{ {'a': messages.count} }}",
        "{{ '%s' % messages.count }}",
        "{{ '%s' | format(messages.count) }}",
        "{{ messages | map(attribute='role') }}",
        "{{ messages | map(attribute='role') ~ '' }}",
        "{{ cycler('a', 'b') }}",
        "{{ [cycler('a', 'b')] | join(' ') }}",
        "{{ joiner(', ') | e }}",
        "{{ raise_exception ~ '' }}",
        "{{ messages | selectattr('role') | string | trim }}",
    ],
)
def test_templates_cannot_write_out_an_address(source: str) -> None:
    with pytest.raises(PromptError, match=r"writes out (something without a text|an address)"):
        _rendered(source)


def test_an_address_in_a_message_is_text_like_any_other() -> None:
    said = "<function f at 0x7f00dead> and its brother at 0X7F00BEEF>"
    message = {"role": "user", "content": said}
    source = "{{ messages[0].content | lower }} {{ '<g at 0x12>' }} {{ bos }}"
    template = ChatTemplate(source, {"bos": "<s at 0x34>"})
    want = f"{said.lower()} <g at 0x12> <s at 0x34>"
    assert template.render([message], add_generation_prompt=True) == want


def test_a_message_that_holds_an_object_is_refused() -> None:
    message: Any = {"role": "user", "content": "x", "tools": [{"call": print}]}
    with pytest.raises(PromptError, match="what JSON can hold"):
        ChatTemplate("{{ messages[0].tools }}", {}).render([message], add_generation_prompt=True)


@pytest.mark.parametrize(
    "message",
    [{"role": "user"}, {"content": "x"}, {"role": "user", "content": None}, "user: x", None, ["user", "x"]],
)
def test_a_message_without_role_or_content_is_refused(message: Any) -> None:
    with pytest.raises(PromptError, match="a message that is not one"):
        ChatTemplate("{{ messages[0].role }}", {}).render([message], add_generation_prompt=True)
