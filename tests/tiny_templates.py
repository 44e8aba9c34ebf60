"""Chat templates in the style of each family, by the names of `tiny_tokenizers`. Written for the tests."""

from __future__ import annotations

# Jinja trims the line breaks after blocks here as everywhere, so the texts hold them as \n in strings.
_LLAMA2 = """{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- bos_token + '[INST] ' + ns.system + message['content'].strip() + ' [/INST]' -}}
{%- set ns.system = '' -%}
{%- else -%}
{{- ' ' + message['content'].strip() + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}"""

_MISTRAL = """{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + ns.system + message['content'] + '[/INST]' -}}
{%- set ns.system = '' -%}
{%- else -%}
{{- ' ' + message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}"""

_CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

_LLAMA3 = """{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

_PHI3 = """{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""

# Gemma 2 has no system role and says so; Gemma 3 puts its text before the first user's.
_GEMMA2 = """{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

_GEMMA3 = """{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = message['content'] + '\\n\\n' -%}
{%- else -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<start_of_turn>' + role + '\\n' + ns.system + message['content'] | trim + '<end_of_turn>\\n' -}}
{%- set ns.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

# Falcon's own ends no turn; here the assistant's ends with the end token, without which none is trained.
_FALCON = """{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Falcon: ' + message['content'] + eos_token + '\\n' -}}
{%- else -%}
{{- message['role'] | capitalize + ': ' + message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Falcon: ' -}}{%- endif -%}"""

TEMPLATES: dict[str, str] = {
    "llama": _LLAMA2,
    "llama3": _LLAMA3,
    "smollm": _CHATML,
    "mistral": _MISTRAL,
    "qwen2": _CHATML,
    "qwen3": _CHATML,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "phi3": _PHI3,
    "falcon": _FALCON,
    "gpt_neox": _FALCON.replace("Falcon: ", "Assistant: "),
}
