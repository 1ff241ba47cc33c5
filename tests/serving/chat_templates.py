"""Chat templates of our own that write tools, calls and thoughts as known families of models do."""

from __future__ import annotations

_MESSAGES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
_END = (
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_TOOLS = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"

HERMES = (
    _TOOLS
    + _MESSAGES
    + '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": {{ c.function.name | tojson }}, "arguments": '
    + "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
    + _END
)
LLAMA = (
    _TOOLS
    + _MESSAGES
    + '{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", "parameters": '
    + "{{ c.function.arguments | tojson }}}{% endfor %}"
    + _END
)
MISTRAL = (
    "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    + _MESSAGES
    + "{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{% endif %}"
    + _END
)
UNKNOWN_CALLS = (
    _TOOLS + _MESSAGES + "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>{% endfor %}" + _END
)
