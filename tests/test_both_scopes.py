"""Scope "process" keeps the promises that scope "request" does, closing apart: the same tests, once more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from wsgi_loop import process

from . import support
from .promises import all_but

#: Those that are about the end of a request's own loop, or about several loops. `test_process` has their counterparts.
ABOUT_OWN_LOOPS = {
    "test_a_child_does_not_wait_for_its_parents_tasks",
    "test_a_body_whose_own_finally_closes_the_response",
    "test_a_call_made_after_the_request_gets_an_error_that_says_what_to_do",
    "test_a_close_of_the_responses_own_class_is_called",
    "test_a_dropped_response_gives_its_thread_back_once",
    "test_a_close_that_a_middleware_has_set_on_the_instance_is_called_inside_the_request",
    "test_a_file_reaches_wsgiref_in_its_own_file_wrapper",
    "test_a_file_response_is_closed_through_the_servers_file_wrapper",
    "test_a_factory_whose_sync_code_makes_a_loop_call_can_make_thread_sensitive_calls_after_it",
    "test_a_fork_in_the_middle_of_a_request_does_not_touch_the_parents_loop",
    "test_a_left_over_loop_call_of_another_thread_gets_an_answer",
    "test_a_left_over_task_is_cancelled_awaited_and_named",
    "test_a_left_over_task_that_blocks_its_loop_thread_does_not_hold_up_later_requests",
    "test_a_left_over_task_that_fails_is_reported",
    "test_a_loop_call_on_a_thread_of_the_default_executor_takes_nothing_from_the_request_thread",
    "test_a_nested_request_has_its_own_loop_and_gives_the_outer_one_back",
    "test_a_response_that_is_dropped_without_close_gives_its_loop_back",
    "test_a_response_that_is_served_by_two_requests_at_once",
    "test_a_response_that_is_served_twice",
    "test_a_second_close_is_djangos_alone",
    "test_a_task_that_swallows_cancellation_is_named_in_an_error_and_meets_no_later_request",
    "test_a_task_without_a_context_can_make_thread_sensitive_calls_after_a_nested_loop_call",
    "test_a_task_without_an_executor_in_its_context_uses_the_request_thread_too",
    "test_a_tool_that_wraps_what_the_handler_returns_is_inside_the_request",
    "test_an_orm_call_in_the_finally_of_a_left_over_task_runs_on_the_request_thread",
    "test_close_is_bounded_when_a_task_never_stops_making_thread_sensitive_calls",
    "test_eight_threads_with_their_own_loops",
    "test_hooks_run_once_in_order_after_request_finished_and_before_the_loop_is_closed",
    "test_left_over_async_generators_are_closed",
    "test_the_first_loop_call_of_a_request_may_be_made_in_request_finished",
    "test_the_loop_is_closed_when_a_receiver_raises",
    "test_the_loop_is_freed",
    "test_the_validator_sees_what_is_wrong",
    "test_two_requests_never_share_a_loop",
    "test_wsgirefs_validator_finds_nothing_wrong",
}

globals().update(all_but(ABOUT_OWN_LOOPS))


@pytest.fixture(autouse=True)
def _process_scope(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(support.default_options, "scope", "process")
    monkeypatch.setitem(support.default_options, "shutdown_timeout", 1)
    yield
    process.shut_down()


@pytest.fixture
def loops() -> list[asyncio.AbstractEventLoop]:
    """A list to put loops in. They stay open."""
    return []
