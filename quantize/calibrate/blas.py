"""How many threads NumPy's matrix products use, which is one number for the whole process.

Where each of our threads codes rows of its own, products that start threads too take half as long again on two cores;
where one thread works for all others, as at X^T X of a layer, they want every core.
"""

from contextlib import AbstractContextManager

from threadpoolctl import threadpool_limits

from kimi_lite.hardware.host import usable_cores


def one_thread() -> AbstractContextManager:
    """For work that is shared out among threads. Not to be entered by them."""
    return threadpool_limits(limits=1, user_api="blas")


def all_threads() -> AbstractContextManager:
    """Within it, for one thread at a time."""
    return threadpool_limits(limits=usable_cores().most_threads, user_api="blas")
