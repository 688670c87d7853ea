"""Chat templates: the jinja text a checkpoint brings, rendered in a sandbox with bounds on time and size.

Renders what transformers' apply_chat_template renders: the same filters and globals (tojson, raise_exception,
strftime_now, loop controls, the generation tag), block trimming, special tokens by name, and messages without their
None entries. A template is code from a checkpoint: it sees plain JSON values only and cannot reach Python, build long
strings, or run on for long.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from shoal.server.chat_sandbox import MAX_RENDERED_CHARS, TemplateLimit, compile_template, render_bounded

_CONTINUE_TAG = "\ue000CONTINUE_FINAL_MESSAGE\ue001 "
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_DEPTH = 32


class ChatTemplateError(ValueError):
    """The conversation cannot be rendered; the text names the template's source, the cause and what to do."""


def read_chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The templates of a checkpoint's folder by name ("default" for the only or main one).

    chat_template.jinja and additional_chat_templates/NAME.jinja; without such files the entry `chat_template` of
    tokenizer_config.json, a string or a list of {"name", "template"}. Raises ChatTemplateError for an entry of another
    form.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: _read(file) for name, file in files.items() if file.is_file()}
    if found:
        return found
    declared = config.get("chat_template")
    where = folder / "tokenizer_config.json"
    if declared is None:
        return {}
    if isinstance(declared, str):
        return {"default": declared}
    if isinstance(declared, dict) and all(isinstance(text, str) for text in declared.values()):
        return dict(declared)
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in declared}
    except (TypeError, KeyError) as error:
        raise ChatTemplateError(
            f"{where}: chat_template must be a string or a list of objects with name and template"
        ) from error


class ChatTemplates:
    """The chat templates of one tokenizer.

    templates: by name. special_tokens: names a template may use (bos_token, ...). source: the checkpoint, for errors.
    """

    def __init__(self, templates: dict[str, str], special_tokens: dict[str, str], source: str) -> None:
        self.templates = templates
        self._special_tokens = special_tokens
        self._source = source

    def __bool__(self) -> bool:
        return bool(self.templates)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation.

        messages: objects with `role` and `content`, oldest first. tools, documents: JSON objects the template may use.
        chat_template: a template's name, or a template. add_generation_prompt: end where the assistant's answer begins.
        continue_final_message: end inside the last message instead, for the model to go on with it. variables: further
        names the template may use (enable_thinking=False). Raises ChatTemplateError.
        """
        if continue_final_message and add_generation_prompt:
            raise ChatTemplateError(
                "continue_final_message=True needs add_generation_prompt=False: the one goes on with the last message, "
                "the other starts a new one"
            )
        text = self._choose(chat_template, bool(tools))
        chat = [_plain_message(message, index) for index, message in enumerate(messages)]
        if not chat:
            raise ChatTemplateError("messages is empty; a chat needs at least one message")
        final = _tag_final_message(chat) if continue_final_message else ""
        names: dict[str, Any] = {**self._special_tokens, **_plain(variables, "the template's variables", 0)}
        names |= {
            "messages": chat,
            "tools": None if tools is None else _plain(list(tools), "tools", 0),
            "documents": None if documents is None else _plain(list(documents), "documents", 0),
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = self._render(text, names)
        return _cut_at_tag(rendered, final) if continue_final_message else rendered

    def _choose(self, wanted: str | None, with_tools: bool) -> str:
        if wanted is not None and wanted in self.templates:
            return self.templates[wanted]
        if wanted is not None and any(mark in wanted for mark in ("{{", "{%", "{#")):
            return wanted
        available = ", ".join(sorted(self.templates)) or "none"
        if wanted is not None:
            raise ChatTemplateError(f"{self._source} has no chat template {wanted!r}; available: {available}")
        if with_tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        if self.templates:
            raise ChatTemplateError(
                f"{self._source} has several chat templates and none is the default: give chat_template one of "
                f"{available}"
            )
        raise ChatTemplateError(
            f"{self._source} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): "
            "use a chat model, "
            "give chat_template=..., or send a plain prompt instead of messages"
        )

    def _render(self, text: str, names: dict[str, Any]) -> str:
        try:
            return render_bounded(_compiled(text), names)
        except TemplateLimit as error:
            raise ChatTemplateError(f"the chat template of {self._source} was stopped: {error}") from error
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template of {self._source} is not valid jinja, line {error.lineno}: {error.message}"
            ) from error
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template of {self._source} refuses the conversation: {error}") from error
        except RecursionError as error:
            raise ChatTemplateError(f"the chat template of {self._source} recurses too deep") from error
        except MemoryError as error:
            raise ChatTemplateError(f"the chat template of {self._source} took all memory") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise ChatTemplateError(
                f"the chat template of {self._source} fails on this conversation: {type(error).__name__}: {error}"
            ) from error


@lru_cache(maxsize=32)
def _compiled(text: str) -> jinja2.Template:
    return compile_template(text)


def _read(file: Path) -> str:
    if file.stat().st_size > _MAX_TEMPLATE_BYTES:
        raise ChatTemplateError(
            f"{file} has {file.stat().st_size} bytes; a chat template may have {_MAX_TEMPLATE_BYTES}"
        )
    return file.read_text(encoding="utf-8")


def _plain(value: Any, where: str, depth: int) -> Any:
    """A copy of plain JSON types; what the template sees. Raises ChatTemplateError for other types, naming where."""
    if depth > _MAX_DEPTH:
        raise ChatTemplateError(f"{where} is nested deeper than {_MAX_DEPTH}")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise ChatTemplateError(
        f"{where} is of type {type(value).__name__}; a chat holds strings, numbers, lists and objects"
    )


def _plain_message(message: Any, index: int) -> dict[str, Any]:
    """One message as the template sees it: without None entries, its reasoning under the names templates read."""
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ChatTemplateError(f"{where} must be an object with role and content, found {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise ChatTemplateError(f"{where} has no role (system, user, assistant, tool)")
    plain = _plain({key: value for key, value in message.items() if value is not None}, where, 0)
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _tag_final_message(chat: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's text; returns that text."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
        return content
    for block in reversed(content if isinstance(content, list) else []):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            text = block["text"]
            block["text"] = text + _CONTINUE_TAG
            return text
    raise ChatTemplateError("continue_final_message=True: the last message has no text to go on with")


def _cut_at_tag(rendered: str, final: str) -> str:
    """The rendered text up to the mark; spaces after it that the template trimmed are trimmed here too."""
    place = rendered.rfind(_CONTINUE_TAG.strip())
    if place < 0 or final.strip() not in rendered:
        raise ChatTemplateError(
            "continue_final_message=True: the chat template does not show the last message as it is"
        )
    if rendered.startswith(_CONTINUE_TAG, place):
        return rendered[:place]
    return rendered[:place].rstrip()


__all__ = ["MAX_RENDERED_CHARS", "ChatTemplateError", "ChatTemplates", "read_chat_templates"]
