"""With "THREAD": "request" the promises hold as they do with a loop thread: the same tests, once more."""

from __future__ import annotations

import pytest

from . import support
from .promises import all_but

#: Those in which the request thread, or its loop thread, waits for what only the other one can do; and those that say
#: which thread it is, or that their loop is another one. Below are their counterparts.
ABOUT_LOOP_THREADS = {
    "test_a_body_whose_loop_has_ended_is_not_taken_for_complete",
    "test_a_call_made_after_the_request_gets_an_error_that_says_what_to_do",
    "test_a_clean_loop_is_not_waited_for",
    "test_a_left_over_task_that_blocks_its_loop_thread_does_not_hold_up_later_requests",
    "test_a_task_that_outlives_its_loop_call_is_served_by_a_body_step",
    "test_a_thread_that_is_interrupted_in_a_step_ends_the_body_before_request_finished",
    "test_every_loop_call_of_a_request_sees_one_loop_and_one_thread",
    "test_system_exit_in_a_child_task_reaches_the_caller_and_the_loop_goes_on",
    "test_a_finally_that_blocks_its_loop_thread_does_not_hold_the_request",
    "test_a_file_reaches_wsgiref_in_its_own_file_wrapper",
    "test_the_validator_sees_what_is_wrong",
    "test_wsgirefs_validator_finds_nothing_wrong",
    "test_two_steps_on_other_threads_are_the_same_task",
}

globals().update(all_but(ABOUT_LOOP_THREADS))


@pytest.fixture(autouse=True)
def _on_the_request_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.default_options, "thread", "request")
