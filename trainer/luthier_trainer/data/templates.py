"""Chooses the chat template that writes messages as text: the tokenizer's own, a file, a text, or one of `TEMPLATES`.

The template stands in the tokenizer from then on, so that it is saved with it in the result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.dataset import ChatTemplate
from luthier_api.exitcodes import ExitCode
from luthier_api.forms import LossOn, RowForm, TemplateName
from luthier_trainer.data.reading import Reader
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = "spec.dataset.chatTemplate"
MOST_BYTES = 1 << 20
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers and TRL recognise them
ZEPHYR = """\
{%- for message in messages -%}
{{- '<|' + message.role + '|>\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message.content + eos_token -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message.content + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
ALPACA = """\
{%- if messages[0].role == 'system' -%}
{{- messages[0].content -}}
{%- else -%}
{{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '\\n\\n### Response:\\n' -}}
{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
{%- elif message.role == 'user' -%}
{{- '\\n\\n### Instruction:\\n' + message.content -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\n### Response:\\n' -}}{%- endif -%}"""
TEMPLATES: Mapping[TemplateName, str] = {"zephyr": ZEPHYR, "chatml": CHATML, "alpaca": ALPACA}
NEEDED: Mapping[TemplateName, tuple[str, ...]] = {"chatml": ("<|im_start|>", "<|im_end|>")}
"""Template → the tokens that must be in the vocabulary. Written in pieces, they would be learnt as ordinary text."""


def choose(tokenizer: PreTrainedTokenizerBase, asked: ChatTemplate | None, form: RowForm, loss_on: LossOn) -> None:
    """Set the chat template of `tokenizer`. It gives notice of a template that nobody asked for.

    Raises Failure if there is none, or if it cannot be used.
    """
    tokenizer.chat_template = _template(tokenizer, asked, form)
    if loss_on == "assistant":
        _mark_turns(tokenizer)


def is_marked(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template marks what the assistant writes."""
    return MARKS.search(str(tokenizer.chat_template)) is not None


def _template(tokenizer: PreTrainedTokenizerBase, asked: ChatTemplate | None, form: RowForm) -> str:
    """Return the template that the job asks for. Raises Failure if it cannot be used."""
    if asked is None:
        return _own(tokenizer, form)
    if asked.name is not None:
        return _brought(tokenizer, asked.name)
    if asked.file is not None:
        return _checked(_read(Path(asked.file)), f"{FIELD}.file: {asked.file}")
    return _checked(str(asked.text), f"{FIELD}.text")


def _own(tokenizer: PreTrainedTokenizerBase, form: RowForm) -> str:
    """Return the template of the tokenizer; for rows of Alpaca, theirs if it has none. Raises Failure otherwise."""
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several, by name
        own = own.get("default")
    if own:
        return str(own)
    if form == "alpaca":
        notice(
            f"{FIELD}: the model's tokenizer has no chat template; name: alpaca is used, which writes the prompts of"
            " Alpaca, and saved with the result"
        )
        return _brought(tokenizer, "alpaca")
    needed = ", ".join(NEEDED["chatml"])
    raise Failure(
        ExitCode.INVALID_SPEC,
        f"{FIELD}: the model's tokenizer has no chat template, as is usual for base models, so messages cannot be"
        f" written as text. Choose one: name: zephyr, which suits any model; name: chatml, for a tokenizer with the"
        f" tokens {needed}; file: a chat_template.jinja, for example of the model's chat version; or text",
    )


def _brought(tokenizer: PreTrainedTokenizerBase, name: TemplateName) -> str:
    """Return one of `TEMPLATES`, which begins with the begin-of-text token if the tokenizer puts one before texts.

    Raises Failure if the tokenizer lacks a token of the template.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in NEEDED.get(name, ()) if token not in vocabulary]
    if missing:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}.name: {name} needs the token {missing[0]}, which the model's tokenizer does not have. Choose"
            f" name: zephyr, or add the tokens: model.addSpecialTokens: {json.dumps(missing)}",
        )
    begin = "{{- bos_token -}}" if Reader(tokenizer).begin else ""
    return begin + TEMPLATES[name]


def _read(path: Path) -> str:
    """Return the template in a file. Raises Failure if there is none."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"has more than {MOST_BYTES} bytes, and is no chat template")
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return text
        template = json.loads(text).get("chat_template")
        if isinstance(template, list):
            template = next((each["template"] for each in template if each.get("name") == "default"), None)
        if not isinstance(template, str):
            raise ValueError("has no chat_template")
        return template
    except (OSError, ValueError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise Failure(ExitCode.INVALID_SPEC, f"{FIELD}.file: {path}: {why}") from None


def _checked(template: str, where: str) -> str:
    """Return a template that can be compiled. Raises Failure if it cannot."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        raise Failure(
            ExitCode.INVALID_SPEC, f"{where}: line {error.lineno} is no Jinja template: {error.message}"
        ) from None
    return template


def _mark_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace a template that does not mark the assistant's turns by TRL's training version of it, if there is one."""
    from trl.chat_template_utils import get_training_chat_template

    if is_marked(tokenizer):
        return
    try:
        training = get_training_chat_template(tokenizer)
    except ValueError:
        return  # TRL does not know this template
    if training:
        tokenizer.chat_template = training
        notice(
            f"{FIELD}: the template of the model does not mark what the assistant writes; TRL's training version of it"
            " is used, and saved with the result"
        )
