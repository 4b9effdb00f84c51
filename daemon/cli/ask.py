"""`eternad ask`: put a question to a model through its engine, and see which version answered."""

from contextlib import closing
from typing import Annotated

import typer

from daemon.cli import context, options, screen


def ask(
    model: options.ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    config: options.ConfigOption = None,
    json: options.JsonOption = False,
    version: Annotated[str | None, typer.Option("--version", help="A number, or `base`. [default: live]")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="At most so many.")] = 128,
) -> None:
    """Ask MODEL something; says which version answered."""
    from daemon.cli import conversation

    loaded = context.load(config)
    engine = loaded.engines[loaded.models[context.model_name(loaded, model)].engine]
    target = conversation.target(model, version)
    with closing(conversation.connect(engine)) as connection:
        answer = conversation.ask(connection, engine, target, prompt, tokens, stream)
        if json:
            return screen.json({"answer": "".join(answer.pieces), "version": answer.version})
        for piece in answer.pieces:
            print(screen.safe_lines(piece), end="", flush=True)
        screen.say()
    typer.echo(f"answered by {answer.version}", err=True)
