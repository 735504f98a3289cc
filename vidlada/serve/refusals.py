"""What is accepted without effect, what is refused and why, in words for whoever wrote the client.

A field that would change the answer and cannot be followed is refused by name: ignoring it would mislead. One that
changes nothing, by what it means or by its value, is accepted, since clients send many of them unasked.
"""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from vidlada.serve.errors import RequestError

# Of OpenAI, vLLM and what sits between: accounts, caches and transport, never the answer.
ACCEPTED = frozenset({
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "prediction", "parallel_tool_calls", "request_id", "priority", "cache_salt", "add_generation_prompt",
    "return_tokens_as_token_ids", "include_stop_str_in_output", "add_special_tokens", "max_tool_calls",
})  # fmt: skip


def nothing(value: Any) -> bool:
    """Asks for nothing: false, zero, or an empty list, map or text."""
    return not value


def one_of(*values: Any) -> Callable[[Any], bool]:
    """Is one of some values."""
    return lambda value: any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)


NO_TOOLS = "the model cannot call tools"
NO_GRAMMAR = "answers cannot be made to follow a grammar; use guided_choice, or response_format with a simple schema"
# Fields whose values change nothing as long as the test says so, and what is said of all other values.
NEUTRAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tools": (nothing, NO_TOOLS),
    "functions": (nothing, NO_TOOLS),
    "tool_choice": (one_of("none", "auto"), NO_TOOLS),
    "function_call": (one_of("none", "auto"), NO_TOOLS),
    "web_search_options": (lambda value: False, "the model cannot search the web"),
    "logit_bias": (nothing, "the bias of single tokens is not supported"),
    "presence_penalty": (one_of(0), "penalties are not supported; leave it at 0"),
    "frequency_penalty": (one_of(0), "penalties are not supported; leave it at 0"),
    "repetition_penalty": (one_of(1), "penalties are not supported; leave it at 1"),
    "length_penalty": (one_of(1), "there is no beam search; leave it at 1"),
    "use_beam_search": (nothing, "there is no beam search"),
    "best_of": (one_of(1), "answers are not ranked; use n for several"),
    "ignore_eos": (nothing, "an answer ends with the end-of-turn token"),
    "min_tokens": (nothing, "the length of an answer has no lower bound"),
    "stop_token_ids": (nothing, "give stop strings in stop"),
    "bad_words": (nothing, "words cannot be forbidden"),
    "allowed_token_ids": (nothing, "use guided_choice to choose between given answers"),
    "skip_special_tokens": (one_of(True), "control tokens are never part of an answer"),
    "spaces_between_special_tokens": (lambda value: True, ""),
    "prompt_logprobs": (nothing, "the prompt's tokens have no probabilities here"),
    "truncate_prompt_tokens": (nothing, "prompts are not truncated; shorten it, or use fewer frames"),
    "logits_processors": (nothing, "they cannot be run here"),
    "guided_regex": (nothing, NO_GRAMMAR),
    "guided_grammar": (nothing, NO_GRAMMAR),
    "audio": (nothing, "the model cannot speak"),
    "modalities": (one_of(["text"], []), 'the model answers in text; use ["text"]'),
    "verbosity": (one_of("medium"), "the length of an answer is set by max_tokens alone; leave it at medium"),
    "prompt_cache_options": (lambda value: True, ""),
}

PARTS = "use text, image_url, video_url or file"
PART_REASONS = {
    "input_audio": "the model sees pictures and cannot hear",
    "audio_url": "the model sees pictures and cannot hear",
}
ROLE_REASON = "the roles are system, developer, user and assistant; the model cannot call tools"


def drop_neutral(data: dict[str, Any]) -> dict[str, Any]:
    """A request without the fields that change nothing.

    Raises:
        RequestError: a field would change the answer and is not supported.
    """
    kept = {}
    for name, value in data.items():
        if name in ACCEPTED:
            continue
        if name not in NEUTRAL:
            kept[name] = value
            continue
        is_neutral, reason = NEUTRAL[name]
        if not is_neutral(value):
            raise unsupported_error(name, reason)
    return kept


def unsupported_error(name: str, reason: str) -> RequestError:
    """The refusal of a field."""
    return RequestError(422, f"{name}: {reason}", "unsupported", name)


def refusal_of(error: ValidationError) -> RequestError:
    """The first thing wrong with a request, named as what it is."""
    first = error.errors(include_url=False, include_input=True, include_context=True)[0]
    where = place(first["loc"])
    return RequestError(
        422, f"{where[:200] or 'the request'}: {reason_of(first)}", "invalid_request", where[:200] or None
    )


def place(location: tuple[int | str, ...]) -> str:
    """Where in a request, as a programmer writes it: `messages[0].content[1].video_url.url`."""
    text, tagged = "", False
    for number, entry in enumerate(location):
        if isinstance(entry, int):
            text += f"[{entry}]"
            tagged = number > 0 and location[number - 1] in ("content", "input")  # the kind of the part comes next
        elif tagged:
            tagged = False
        else:
            text += f".{entry}" if text else str(entry)
    return text


def reason_of(first: Any) -> str:
    """What is wrong, in plain words."""
    kind, given, context = first["type"], first.get("input"), first.get("ctx", {})
    if kind == "extra_forbidden":
        return "it is not known here"
    if kind == "missing":
        return "it is missing"
    if kind == "union_tag_invalid":
        tag = str(context.get("tag"))[:80]
        return f"a part of type {tag!r} cannot be used: {PART_REASONS.get(tag, PARTS)}"
    if kind == "union_tag_not_found":
        return f"a part needs a type; {PARTS}"
    if kind == "literal_error" and first["loc"][-1] == "role":
        return f"{str(given)[:80]!r} is not known here; {ROLE_REASON}"
    if kind == "list_type" and first["loc"][-1] == "content":
        return "it must be a text or a list of parts"
    return str(first["msg"])
