"""The real daemon process with a trainer of a few lines and an engine in memory: `scripted_daemon.py DIRECTORY`.

DIRECTORY is the test's: `eternad.toml`, `lab/` (see `service_kit`), `library/`, `state/`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from service_kit import MemoryEngine

from daemon import service, update
from daemon.service import serving

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    update.COMMAND = [sys.executable, str(directory / "lab" / "trainer.py")]
    engine = MemoryEngine()
    serving.build = lambda *settings: engine  # type: ignore[assignment]
    sys.exit(service.run(directory / "eternad.toml"))
