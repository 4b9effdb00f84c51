"""Players with the openai client, as a process of its own: `players.py URL THREADS`.

They ask again and again, every second time for a stream, until standard input ends. After every 25 answers of a thread
a line says so; the last line is what all of them have got: {"done": {version: answers}, "faults": [...]}.
"""

import itertools
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import openai

STEP = 25
WORDS = 5


class Player(threading.Thread):
    """One of them; keeps what was wrong."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        """Until told to stop. No retries: one failed request would be one too many."""
        with openai.OpenAI(base_url=self._url + "/v1", api_key="-", max_retries=0, timeout=30) as client:
            for turn in itertools.count(1):
                if self.stop.is_set():
                    return
                try:
                    self._check(*(self._stream(client) if turn % 2 else self._whole(client)))
                except openai.OpenAIError as error:
                    self.faults.append(repr(error))
                if turn % STEP == 0:
                    os.write(1, b"%d\n" % STEP)  # a line at once, whoever else writes

    def _whole(self, client: openai.OpenAI) -> tuple[set[str], str]:
        found = client.chat.completions.with_raw_response.create(model="npc", messages=[])
        answer = found.parse()
        return {answer.model, found.headers["x-adapter-version"]}, answer.choices[0].message.content or ""

    def _stream(self, client: openai.OpenAI) -> tuple[set[str], str]:
        with client.chat.completions.create(model="npc", messages=[], stream=True) as stream:
            chunks = list(stream)
            named = {chunk.model for chunk in chunks} | {stream.response.headers["x-adapter-version"]}
        return named, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def _check(self, named: set[str], text: str) -> None:
        words = text.split()
        if len(words) != WORDS or len(named | set(words)) != 1:
            self.faults.append(f"{named} said {text}")
        self.done.update(named)


class Players:
    """A process of players, seen from the test."""

    def __init__(self, url: str, threads: int) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), url, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.asked = 0
        """Answers so far, nearly."""
        self.done: Counter[str] = Counter()
        self.faults = ["the players have not ended"]
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def stop(self) -> None:
        """After the present answers; then `done` and `faults` are whole."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reader.join(60)
        self._process.wait(60)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                last = json.loads(line)
                self.done, self.faults = Counter(last["done"]), last["faults"]
            else:
                self.asked += int(line)
        self._process.stdout.close()


def main(url: str, threads: int) -> None:
    """See the module's text."""
    players = [Player(url) for _ in range(threads)]
    for player in players:
        player.start()
    sys.stdin.read()
    for player in players:
        player.stop.set()
    for player in players:
        player.join()
    done = sum((player.done for player in players), Counter())
    print(json.dumps({"done": done, "faults": [fault for player in players for fault in player.faults]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
