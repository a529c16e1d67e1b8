"""How a process ends: a mistake is one line and an exit code, anything else a traceback."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable

from pipeline.options import AgreedError, UserError

OTHER_RANKS_WAIT = 10.0  # seconds; a launcher ends the ranks that are left after about one
AGREED_WAIT = 1.0  # seconds, in which rank 0 tells what all ranks know
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def no_room(error: OSError) -> str:
    """One line on a disk that takes no more; "" for any other error."""
    if error.errno not in _FULL:
        return ""
    place = error.filename or "a file"
    return f"{place}: cannot be written ({error.strerror}); make room there"


def run_as_program(main: Callable[[], None]) -> None:
    """Run `main`; a user's mistake becomes one line on stderr and exit code 2, a full disk too.

    Under a launcher most mistakes are found by every rank and one of them, rank 0, tells them.
    Another speaks only when it is still there a while later: what it found, it alone has found.
    """
    rank = os.environ.get("RANK", "0")
    try:
        main()
    except AgreedError as error:
        if rank == "0":
            _tell(error)
        else:
            # A launcher ends its other ranks when one has ended: rank 0 speaks first.
            time.sleep(AGREED_WAIT)
        sys.exit(error.exit_code)
    except UserError as error:
        if rank != str(error.told_by):
            time.sleep(OTHER_RANKS_WAIT)
        _tell(error, "" if rank == "0" else f"rank {rank}: ")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if rank == "0":  # a terminal interrupts them all
            print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if not (told := no_room(error)):
            raise
        _tell(told, "" if rank == "0" else f"rank {rank}: ")
        sys.exit(UserError.exit_code)


def _tell(what: object, speaker: str = "") -> None:
    print(f"{speaker}error: {' '.join(str(what).split())}", file=sys.stderr, flush=True)
