"""Failures, and the test that shows what comes of each.

| failure | test |
|---|---|
| kill -9 before BEGIN, in an operation, before COMMIT, between COMMIT and the acknowledgement, between that and publication | test_faults_kill.py::test_kill_9 |
| kill -9 at random moments under load | tests/planet/test_storm.py::test_a_storm_with_kills |
| kill -9 of one replica in mid-batch | test_faults_kill.py::test_a_replica_killed_in_mid_batch_holds_up_no_other |
| kill -9 between the steps of a payout | test_money.py::test_killed_between_any_two_steps_it_pays_once |
| kill -9 between an event and its delivery | test_webhooks.py::test_what_was_not_acknowledged_is_sent_after_a_crash |
| power cut, read-only remount (ext4 that is shut down) | test_faults_disk.py::test_a_power_cut_loses_nothing_that_was_acknowledged |
| the same without waiting for the disk: the loss is seen | test_faults_disk.py::test_a_power_cut_is_seen_to_lose_what_was_not_synced |
| EIO at a commit, then a power cut | test_faults_disk.py::test_what_is_acknowledged_after_a_disk_error_survives_a_power_cut |
| EIO at a commit, kill -9, start, then a power cut | test_faults_disk.py::test_what_a_killed_program_could_not_write_is_written_before_the_next_serves |
| disk full | test_faults_disk.py::test_a_full_disk_refuses_and_heals_with_space |
| restored backup older than the log | test_log_witnesses.py::test_a_restored_older_log_does_not_start |
| two programs on one file | test_program.py::test_a_second_program_on_one_directory |
| PostgreSQL restarts among settlements | test_faults_kill.py::test_a_database_that_restarts_among_settlements_loses_none |
| PostgreSQL ends a session | test_store_replicas.py::test_a_lost_session_between_batches_is_not_noticed |
| no wake-up arrives | test_events.py::test_a_lost_wake_up_only_delays |
| clock jumps by an hour, forward and back, before a deadline | test_faults_requests.py::test_a_clock_that_jumps_crosses_no_deadline |
| any jumps of a clock | test_clock.py::test_it_never_goes_back_and_never_hurries |
| duplicate, reordered and concurrent documents | test_faults_requests.py::test_requests_that_come_twice_and_at_once_are_one |
| concurrent requests with one key | test_api_idempotency.py::test_requests_at_the_same_time_are_one |
| one key, another body | test_api_idempotency.py::test_another_request_under_the_key_is_refused |
| lost answer, then a retry | test_escrow.py::test_a_lost_answer_is_had_again_whatever_the_time_and_the_terms |
| stale, forged, over-cap, wrong-domain and foreign vouchers among good ones | test_faults_requests.py::test_hostile_claims_among_good_ones_move_nothing |
| a claim after its window | test_faults_requests.py::test_a_claim_that_comes_too_late_takes_nothing_back |
| bit flips in envelopes | tests/protocol/test_envelope.py::test_every_flipped_bit_is_noticed |
| unknown fields in envelopes | tests/protocol/test_codec.py::test_an_unknown_field_is_refused_in_every_message |
| revoked keys | test_keys.py::test_a_revoked_key_signs_nothing_and_strands_no_money |
| rotation in mid-session | test_keys.py::test_an_agreement_may_still_name_the_old_key |
| expired credentials | test_identity.py::test_token_ends_with_the_certificate_and_is_pruned |
| a party vanishes in any state | test_escrow_rows.py::test_rows |
| dispute against the end of the window | test_escrow_disputed.py::test_no_window_ends_a_dispute |
| a silent checker | test_disputes_checks.py::test_a_silent_checker_is_replaced_until_none_is_left |
| deposits replayed, out of order, void | test_money.py::test_deposits_are_credited_once_in_any_order |
| webhook replay | test_webhooks.py::test_a_replay_during_a_delivery_wins |
| slow or stalled reader of events, over SSE and WebSocket | test_faults_line.py::test_a_reader_that_takes_nothing_is_let_go_and_holds_up_nobody |
| answers that nobody reads | test_faults_line.py::test_answers_that_nobody_reads_do_not_keep_a_connection |
| slowloris in head and body | test_faults_line.py::test_a_byte_at_a_time_does_not_keep_a_connection |
| bodies whose length can be read in two ways, against h11 | test_faults_line.py::test_what_another_parser_does_not_take_is_refused |
| oversized head, bad chunking | test_server.py::test_a_head_that_is_refused_is_answered_with_a_problem |
| oversized body, with and without a length | test_faults_line.py::test_a_body_without_end_is_cut_off |
| pipelining | test_faults_line.py::test_pipelined_requests_are_answered_in_their_order |
| a split view of the log | test_log_witnesses.py::test_a_lying_coordinator_is_caught_by_its_witnesses |

The power cut is that of a file system: what it has not handed to the device is gone. A disk whose
own cache loses what it has confirmed is not simulated.
"""  # noqa: E501 - a table
