"""Worker processes for decoding: results in order, a crash costs one item, and nothing outlives the caller."""

import multiprocessing
import os
import signal
import tempfile
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from training import distributed
from uscl_hub.clips import memory
from uscl_hub.clips.clip import MAX_SECONDS
from uscl_hub.errors import UserError

SECONDS = MAX_SECONDS  # of one item; a decoder that hangs is ended
CRASHED = f"the decoder crashed, or took more than {SECONDS} s"
FIRST = 8  # items: where all of so many crash, the fault is not theirs
_SOCKET_PATH = 70  # bytes of a temporary folder's name that leave room for a socket's name in it

_function = None  # in a worker: what it does with an item

NO_START = (
    "the processes that decode cannot start. A script that calls this needs `if __name__ == '__main__':` around what "
    "it does, and must be a file, not standard input; or decode in this process, with workers=0"
)
ALL_CRASH = (
    f"the first {FIRST} clips all ended the process that decodes them: the fault is not theirs. "
    "Is there enough memory? Fewer workers (--data.workers) need less"
)


class WorkersError(UserError):
    """The worker processes do not work at all; the message says what to do."""


def ordered(function, items, count: int, preload: str):
    """Yields function(item) of every item, in order, computed in `count` processes; CRASHED for one that ends them.

    Args:
        function: picklable; called in a worker, in its main thread. A worker gets it once, however much it holds.
        items: a list.
        count: processes; 0 calls the function here.
        preload: a module that the workers' common parent imports once.

    Raises:
        WorkersError: no worker can start, or the first items all end theirs.
    """
    if count == 0:
        yield from map(function, items)
        return
    waiting, flying, crashes, done = deque(items), deque(), 0, 0
    pool = Pool(function, count, preload)
    try:
        while waiting or flying:
            try:
                while waiting and len(flying) < 2 * count:
                    flying.append((waiting[0], pool.submit(waiting[0])))
                    waiting.popleft()
                results = [flying[0][1].result()]
                flying.popleft()
            except BrokenProcessPool:  # seen at a submission, or at a result: those in flight are tried one by one
                pool.end()
                again = [item for item, _ in flying] or [waiting.popleft()]
                flying.clear()
                results = (alone(function, item, preload) for item in again)
                pool = None
            for result in results:
                crashes, done = crashes + (result == CRASHED), done + 1
                if crashes == done == FIRST:
                    raise WorkersError(ALL_CRASH)
                yield result
            pool = pool or Pool(function, count, preload)
    finally:
        if pool:
            pool.end()


def alone(function, item, preload: str):
    pool = Pool(function, 1, preload)
    try:
        return pool.submit(item).result()
    except BrokenProcessPool:
        return CRASHED
    finally:
        pool.end()


class Pool:
    """Processes that call one function. They end at once when told to, whatever they are at, and when this process is
    killed."""

    def __init__(self, function, count: int, preload: str):
        # forkserver: the imports happen once, not once a worker. It listens at a socket in the temporary folder.
        short = len(os.fsencode(tempfile.gettempdir())) <= _SOCKET_PATH
        method = "forkserver" if short and "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([preload])
        self._until, self._stop = context.Pipe(duplex=False)
        sharing = count * distributed.local_world()
        self._executor = ProcessPoolExecutor(count, context, start_worker, (self._until, sharing, function))
        try:
            self._executor.submit(os.getpid).result()
        except BrokenProcessPool:
            self.end()
            raise WorkersError(NO_START) from None
        except BaseException:
            self.end()
            raise

    def submit(self, item):
        return self._executor.submit(limited, item)

    def end(self):
        self._stop.close()  # the workers' watchers see it
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._until.close()


def start_worker(until, count: int, function):
    """One of `count` workers, which share the memory budget. It leaves signals to its parent, and ends when that closes
    its pipe or is killed."""
    global _function
    _function = function
    memory.divide(count)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch():
        wait([parent.sentinel, until])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def limited(item):
    """The worker's function(item), ended with its process after SECONDS: a decoder that hangs sees no exception."""
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
    try:
        return _function(item)
    finally:
        if hasattr(signal, "alarm"):
            signal.alarm(0)


def imported_by_a_worker() -> bool:
    """Whether this process is a worker that is only just importing its parent's script."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)
