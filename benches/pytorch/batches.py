"""How each side takes its times: as `fastest` of benches/cases/rounds.rs."""

import time


def fastest(call, calls, batches):
    """Nanoseconds a call of the fastest of some batches of calls."""
    best = float("inf")
    for _ in range(batches):
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter_ns() - start)
    return best / calls
