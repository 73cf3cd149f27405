"""What a sandbox's child runs in the tests; its imports are light, for every child imports this."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SECRET = "somebody@example.org"


class Refused(Exception):
    reason = "too_many_pixels"


def opened() -> Callable[[Sequence[str]], list[str]]:
    """What the child runs: shouts each word back, and does what a word tells it to."""

    def shout(words: Sequence[str]) -> list[str]:
        return [_obey(word) for word in words]

    return shout


def _obey(word: str) -> str:
    command, _, value = word.partition(" ")
    match command:
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            sys.exit(SECRET)
        case "hang":
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            while True:
                time.sleep(1)
        case "raise":
            print(SECRET, file=sys.stderr)
            raise KeyError(SECRET)
        case "refuse":
            raise Refused(SECRET)
        case "allocate":
            return str(len(bytearray(int(value))))
        case "killed_once":  # by somebody else, as far as anyone can see
            try:
                Path(value).touch(exist_ok=False)
            except FileExistsError:
                return "alive"
            os.kill(os.getpid(), signal.SIGKILL)
    return word.upper()


def broken(error: Exception) -> Callable[[Sequence[str]], list[str]]:
    raise error


def dying() -> Callable[[Sequence[str]], list[str]]:
    os.abort()
