"""Tell systemd how the service is doing, and take its sockets: sd_notify(3) and sd_listen_fds(3), in stdlib only.

Nothing here raises: a supervisor that is gone, or was never there, must not stop the daemon. `WATCHDOG=1` belongs to
the loop that makes progress, never to a thread of its own: a pinging thread keeps a hung daemon alive.
"""

import os
import socket
import time


def notify(**fields: str | int) -> bool:
    """Send `FIELD=value` lines to the supervisor, such as `notify(READY=1, STATUS="12 pending")`.

    True when the datagram was handed over; False without `NOTIFY_SOCKET` or when sending failed. Line breaks in a
    value become spaces, so that text from outside cannot smuggle in a field of its own.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    message = "\n".join(f"{field}={' '.join(str(value).split())}" for field, value in fields.items())
    path = "\0" + address[1:] if address.startswith("@") else address  # @: Linux's abstract name space, unix(7)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as supervisor:
            supervisor.settimeout(1.0)  # PID 1 in a long stall: one ping is lost, the loop goes on
            supervisor.sendto(message.encode("utf-8", "replace"), path)
    except (OSError, ValueError):
        return False
    return True


def notify_reloading(status: str = "reloading") -> bool:
    """To be called first thing on SIGHUP; `notify(READY=1)` ends the reload, whether the new config was taken or not.

    The monotonic time is what `Type=notify-reload` (systemd 253) compares with the moment of its signal.
    """
    microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    return notify(RELOADING=1, MONOTONIC_USEC=microseconds, STATUS=status)


def watchdog_seconds() -> float | None:
    """Seconds within which systemd wants a `WATCHDOG=1` (ping at half of it); None when it does not watch us."""
    owner = os.environ.get("WATCHDOG_PID", "")
    if owner and owner != str(os.getpid()):  # inherited from a parent that is the one being watched
        return None
    try:
        microseconds = int(os.environ.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return microseconds / 1e6 if microseconds > 0 else None


def inherited_sockets() -> list[socket.socket]:
    """The listening sockets of the `.socket` unit, in its order; empty when we were not started through one.

    They stay open in systemd while the service restarts, so that clients wait instead of being refused. To be called
    once: the variables are taken out of the environment, since the numbers mean nothing to a child.
    """
    owner, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "0")
    if owner != str(os.getpid()) or not count.isdecimal():
        return []
    sockets = [socket.socket(fileno=descriptor) for descriptor in range(3, 3 + int(count))]  # 3: SD_LISTEN_FDS_START
    for each in sockets:
        each.set_inheritable(False)
    return sockets
