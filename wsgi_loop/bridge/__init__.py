"""Everything that depends on asgiref's internals. Knows nothing of Django, and nothing of how a loop is run.

`async_to_sync` looks for a running loop in thread-locals of `SyncToAsync`. A request's scope stands there in place of a
loop. So each call of async_to_sync arrives as asgiref's own coroutine (`AsyncToSync.main_wrap`) at the scope's
`call_soon_threadsafe`, on the thread that makes the call. The call is done when that method returns. asgiref then finds
the answer, and waits for nothing. Below async code asgiref hands calls to the loop itself, whose `call_soon_threadsafe`
leads to the same place.

Thread-sensitive calls arrive at the loop's `run_in_executor`, with the `Executor` that their context holds.

Nothing of asgiref is patched, but while somebody watches (`watching`). What is read or set here was read in asgiref
3.12.1 and 3.13.0, and `shape` refuses one in which it is not as it was there.
"""

from . import shape

shape.check()
