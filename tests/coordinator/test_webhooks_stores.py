"""Events, webhooks and kept answers on PostgreSQL: the same tests as on a file."""

from __future__ import annotations

from tests.coordinator import test_api_idempotency as kept
from tests.coordinator import test_events as events
from tests.coordinator import test_webhooks as webhooks

STORES = ("postgres",)

endpoint = webhooks.endpoint
test_in_order = webhooks.test_events_arrive_signed_and_in_order
test_tried_again = webhooks.test_a_failure_is_tried_again_and_holds_up_the_rest
test_given_up_and_replayed = webhooks.test_three_days_of_failure_disable_and_a_replay_goes_on
test_one_at_a_time = webhooks.test_two_processes_do_not_deliver_side_by_side
test_streams = events.test_a_stream_gives_the_past_then_the_present
test_ids = events.test_ids_have_no_gaps_and_cannot_be_rewritten
test_pages = events.test_pages_hold_ones_own_events_only
test_same_time = kept.test_requests_at_the_same_time_are_one
test_bounded = kept.test_the_number_of_kept_answers_is_bounded
test_kept_for_three_days = kept.test_answers_are_kept_for_three_days_and_sealed
