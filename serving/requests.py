"""What clients send: OpenAI's bodies for completions and chat, checked, and turned into tokens and sampling."""

from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from serving.refusal import Refusal
from serving.sampling import Sampling

MAX_ALTERNATIVES = 20
# would change the answer and are not implemented: better refused than silently ignored
UNSUPPORTED = ("tools", "functions", "suffix", "logit_bias", "presence_penalty", "frequency_penalty", "min_p",
               "guided_json", "structured_outputs")  # fmt: skip

Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
TopP = Annotated[float, msgspec.Meta(gt=0, le=1)]
TopK = Annotated[int, msgspec.Meta(ge=-1)]
Alternatives = Annotated[int, msgspec.Meta(ge=0, le=MAX_ALTERNATIVES)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Tokens = Annotated[int, msgspec.Meta(ge=0)]


class StreamOptions(msgspec.Struct):
    """How a stream ends."""

    include_usage: bool = False


class _Common(msgspec.Struct, kw_only=True):
    model: str
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    """Of vLLM: only so many of the most likely tokens; 0 and -1: all."""
    n: int | None = None
    best_of: int | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    """Of vLLM: go on to max_tokens, for load tests."""


class CompletionBody(_Common, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[Any]
    """A string or one list of token ids."""
    echo: bool | None = None
    logprobs: Alternatives | None = None
    return_tokens_as_token_ids: bool | None = None
    """Of vLLM: name tokens `token_id:123` in `logprobs`."""


class ContentPart(msgspec.Struct):
    """A piece of a message; only text is understood."""

    type: str
    text: str = ""


class ChatMessage(msgspec.Struct):
    """One message as clients send it."""

    role: str
    content: str | list[ContentPart] | None = None


class ChatBody(_Common, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request."""

    model: str
    chat: bool
    prompt: list[int]
    sampling: Sampling
    stream: bool
    include_usage: bool
    echo: str | None = None
    """The prompt's text, where the answer repeats it."""
    name_ids: bool = False


def parse(body: bytes, *, chat: bool) -> CompletionBody | ChatBody:
    """The body by its route; `Refusal` 400 says which field is wrong."""
    try:
        raw = msgspec.json.decode(body, type=dict[str, Any])
        asked = [key for key in UNSUPPORTED if raw.get(key)]
        if asked:
            raise Refusal(400, f"{', '.join(asked)}: not supported by this server")
        parsed = msgspec.convert(raw, ChatBody) if chat else msgspec.convert(raw, CompletionBody)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"bad request body: {error}") from None
    if (parsed.n or 1) != 1 or (parsed.best_of or 1) != 1:
        raise Refusal(400, "n and best_of: only 1 is supported")
    return parsed


def complete(body: CompletionBody, tokenizer: Any, context: int, vocabulary: int) -> Call:
    """A legacy completion; with `echo` and `logprobs` the prompt is scored (`max_tokens` 0: nothing but that)."""
    prompt, text = _prompt(body.prompt, tokenizer, vocabulary)
    echo = bool(body.echo)
    wanted = 16 if body.max_tokens is None else body.max_tokens
    if wanted == 0 and not echo:
        raise Refusal(400, "max_tokens must be at least 1 (0 only with echo)")
    return Call(
        model=body.model, chat=False, prompt=prompt, echo=text() if echo else None,
        sampling=_sampling(body, _room(prompt, wanted, context), body.logprobs, echo and body.logprobs is not None),
        stream=bool(body.stream), include_usage=_wants_usage(body), name_ids=bool(body.return_tokens_as_token_ids),
    )  # fmt: skip


def converse(body: ChatBody, tokenizer: Any, context: int) -> Call:
    """A chat: the messages rendered with the model's own template."""
    messages = [{"role": message.role, "content": _text(message)} for message in body.messages]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like about roles and their order
        raise Refusal(400, f"the model's chat template refuses these messages: {error}") from None
    prompt: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
    wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if wanted == 0:
        raise Refusal(400, "max_tokens must be at least 1")
    alternatives = (body.top_logprobs or 0) if body.logprobs else None
    return Call(
        model=body.model, chat=True, prompt=prompt, stream=bool(body.stream), include_usage=_wants_usage(body),
        sampling=_sampling(body, _room(prompt, wanted, context), alternatives, False),
    )  # fmt: skip


def _prompt(prompt: str | list[Any], tokenizer: Any, vocabulary: int) -> tuple[list[int], Callable[[], str]]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        text = prompt
        return tokenizer.encode(text), lambda: text
    ids = prompt
    if not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        raise Refusal(400, f"prompt: one string or one list of token ids below {vocabulary} per request")
    return ids, lambda: str(tokenizer.decode(ids))


def _room(prompt: list[int], wanted: int | None, context: int) -> int:
    """How many tokens the answer may have; `Refusal` 400 when prompt and answer do not fit the context."""
    if not prompt:
        raise Refusal(400, "the prompt has no tokens")
    room = context - len(prompt)
    if room < (1 if wanted is None else wanted):
        raise Refusal(
            400,
            f"This model's maximum context length is {context} tokens: {len(prompt)} in the prompt and"
            f" {wanted or 1} for the answer are too many",
        )
    return room if wanted is None else wanted


def _sampling(body: _Common, max_tokens: int, logprobs: int | None, prompt_logprobs: bool) -> Sampling:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        seed=body.seed,
        stop=tuple(text for text in stop if text),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        ignore_eos=bool(body.ignore_eos),
    )


def _wants_usage(body: _Common) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _text(message: ChatMessage) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    if any(part.type != "text" for part in message.content):
        raise Refusal(400, "messages: only text content is supported")
    return "".join(part.text for part in message.content)
