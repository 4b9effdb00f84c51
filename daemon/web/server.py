"""uvicorn in a thread of the daemon, asleep while nobody asks."""

import asyncio

import uvicorn


class Server(uvicorn.Server):
    """uvicorn without its ten wake-ups a second, which are most of what an idle daemon would cost (0.18 % of a CPU)."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        """Until `stop`."""
        self._loop = asyncio.get_running_loop()
        if not self.should_exit:
            await self._stop.wait()

    def stop(self) -> None:
        """From any thread."""
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
