"""Other words for the same thing: variants of an example by rule, and what a teacher is asked for. Torch-free, pure.

Facts that are trained on in one wording are not found again in another (Allen-Zhu & Li, arXiv:2309.14316); rows that
say them differently mend that. An answer is never reworded: what is right stays right.
"""

import re
from collections.abc import Iterator

import msgspec

from buffers.example import Example, Message

ASKED = ("Please tell me: {0}", "A question: {0}", "{0} Please answer.", "I want to know: {0}", "Do you know: {0}")
"""Around a user's message."""
LEADS = ("Please answer.\n", "Here is something to answer.\n", "From a conversation in the Library:\n", "Try this.\n")
"""Before a prompt that is used as it stands."""
SENTENCE_WORDS = 4
"""A shorter sentence says nothing by itself."""
SHORTEST, LONGEST = 0.4, 2.5
"""Length of a paraphrase against what it says again: beyond, something is missing or invented."""


def templates(example: Example) -> Iterator[Example]:
    """The question put into other frames; nothing for texts."""
    if example.shape == "text":
        return
    is_raw, question = isinstance(example.prompt, str), question_of(example)
    for words in [lead + question for lead in LEADS] if is_raw else [frame.format(question) for frame in ASKED]:
        yield from _asked(example, words)


def question_of(example: Example) -> str:
    """What is asked: the last user's message, or the prompt as it stands."""
    if isinstance(example.prompt, str):
        return example.prompt
    return next((message.content for message in reversed(example.prompt) if message.role == "user"), "")


def _asked(example: Example, question: str) -> Iterator[Example]:
    """The example with another last user's message; nothing where there is none."""
    if isinstance(example.prompt, str):
        yield msgspec.structs.replace(example, prompt=question)
        return
    places = [place for place, message in enumerate(example.prompt) if message.role == "user"]
    if places:
        prompt = list(example.prompt)
        prompt[places[-1]] = Message(role="user", content=question)
        yield msgspec.structs.replace(example, prompt=tuple(prompt))


def sentences(example: Example) -> Iterator[Example]:
    """Each sentence of a text alone, the longest first: a fact is learned without its neighbours."""
    found = _sentences(example)
    if len(found) > 1:
        for sentence in sorted(found, key=len, reverse=True):
            if len(sentence.split()) >= SENTENCE_WORDS:
                yield Example(shape="text", completion=sentence)


def chunks(example: Example) -> Iterator[Example]:
    """Windows of half a text that overlap by half: cut elsewhere than the text itself was."""
    found = _sentences(example)
    size = len(found) // 2
    if size < 1:
        return
    step = max(size // 2, 1)
    for start in range(0, len(found) - size + 1, step):
        yield Example(shape="text", completion=" ".join(found[start : start + size]))


def _sentences(example: Example) -> list[str]:
    if example.shape != "text":
        return []
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", example.completion) if part.strip()]


def paraphrase_order(example: Example) -> str:
    """What a teacher is asked, for one paraphrase."""
    what, body = ("question", question_of(example)) if example.shape != "text" else ("text", example.completion)
    return (
        f"Say the following {what} in other words. Keep its meaning, every name and every number."
        f" Answer with the new {what} alone.\n\n{body}"
    )


def paraphrases(example: Example, said: str) -> Iterator[Example]:
    """The example in the teacher's words; nothing where numbers differ, the length is off, or nothing was reworded."""
    before = example.completion if example.shape == "text" else question_of(example)
    said = said.strip().strip('"')
    is_whole = SHORTEST <= len(said) / max(len(before), 1) <= LONGEST
    if not is_whole or said == before or _numbers(said) != _numbers(before):
        return
    if example.shape == "text":
        yield Example(shape="text", completion=said)
    else:
        yield from _asked(example, said)


def _numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", text))


def questions_order(example: Example, count: int) -> str:
    """What a teacher is asked, for questions about a text."""
    return (
        f"Write {count} questions that the following text answers, each with its answer in words of the text, as lines"
        f" `Q: question` and `A: answer`.\n\n{example.completion}"
    )


def questions(example: Example, said: str, *, chat: bool) -> Iterator[Example]:
    """Question and answer pairs about a text; only those whose answer stands in the text, word for word."""
    text = " ".join(example.completion.lower().split())
    for question, answer in re.findall(r"^\W*Q:[ \t]*(\S.*?)[ \t]*\n+\W*A:[ \t]*(\S.*?)[ \t]*$", said, re.MULTILINE):
        if " ".join(answer.lower().rstrip(".").split()) not in text:
            continue
        if chat:
            prompt = (Message(role="user", content=question),)
            yield Example(shape="demonstration", prompt=prompt, completion=answer)
        else:
            yield Example(shape="demonstration", prompt=f"Question: {question}\nAnswer:", completion=f" {answer}")
