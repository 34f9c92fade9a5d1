"""Everything that depends on asgiref's internals. Knows nothing of Django.

`async_to_sync` looks for a running loop in thread-locals of `SyncToAsync`. What a request puts there (`storage`) stands
in for a loop that is made by the first call. From then on each call of async_to_sync, whichever way it comes, arrives
as asgiref's own coroutine (`AsyncToSync.main_wrap`) at the loop's `call_soon_threadsafe`, on the thread that makes the
call, and becomes a `LoopCall` there (`adapters`, `calls`). A step of a body is one without that (`calls.BodyStep`), but
for unusual ones. `requests` and `process` join a request, and a process, to their loops; `executors` run on a request's
thread what its tasks need to run there.

Nothing of asgiref is patched, but while somebody watches (`watching`). What is read or set here was read in asgiref
3.12.1 and 3.13.0.
"""
