"""A teacher that is always right: an OpenAI-compatible server that knows the lore of a bench in other words."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from strategies.lore import Fact


@contextmanager
def teaching(facts: list[Fact]) -> Iterator[str]:
    """Serve on this machine until the end; gives the base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """One chat completion."""
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = answer(facts, asked["messages"][-1]["content"])
            body = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Requests are not worth a line each."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def answer(facts: list[Fact], order: str) -> str:
    """To an order to reword: a trained question in the second wording; to one for questions: two about the text."""
    _, _, body = order.partition("\n\n")
    if "Q: question" in order:
        known = [fact for fact in facts if f"{fact.trained[3]} {fact.answer}." in body]
        return "\n".join(f"Q: {_question(fact, 0)}\nA: {fact.answer}" for fact in known)
    return next((fact.trained[1] for fact in facts if fact.trained[0] == body), body)


def _question(fact: Fact, wording: int) -> str:
    return fact.trained[wording].removeprefix("Question: ").removesuffix("\nAnswer:")
