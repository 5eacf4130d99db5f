"""The cost of a turn is measured with a thread that plays the GPU."""

from kimi_lite.tools.kernels.turn_bench import seconds_a_turn


def test_programs_of_turns_are_timed():
    times_s = seconds_a_turn(num_threads=1, num_turns=3, num_programs=4)
    assert len(times_s) == 4 and all(0 < each < 10 for each in times_s)
