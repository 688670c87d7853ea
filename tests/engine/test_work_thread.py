"""WorkThread: all work in one thread, in order; results and errors reach whoever asked; its end."""

import threading

import pytest

from shoal.engine.work_thread import WorkThread


def test_all_work_is_done_by_one_thread_in_order() -> None:
    thread, done = WorkThread(), []
    idents = [thread.submit(lambda number=number: done.append(number) or threading.get_ident()) for number in range(5)]
    thread.finish(lambda: done.append(threading.get_ident()))
    thread.join(5.0)
    assert not thread.is_alive()
    assert done[:5] == list(range(5))
    assert {future.result(0) for future in idents} == {done[5]} != {threading.get_ident()}


def test_an_error_is_its_callers_and_the_thread_goes_on() -> None:
    thread = WorkThread()
    failing, fine = thread.submit(lambda: 1 // 0), thread.submit(lambda: "fine")
    with pytest.raises(ZeroDivisionError):
        failing.result(5.0)
    assert fine.result(5.0) == "fine"
    thread.finish()
    thread.join(5.0)
    assert not thread.is_alive()


def test_work_that_was_cancelled_in_time_is_left_out() -> None:
    thread, begun, may_end, done = WorkThread(), threading.Event(), threading.Event(), []
    first = thread.submit(lambda: begun.set() or may_end.wait(5.0))
    assert begun.wait(5.0)
    second = thread.submit(lambda: done.append(2))
    assert second.cancel() and not first.cancel()
    may_end.set()
    thread.finish()
    thread.join(5.0)
    assert first.result(0) is True and done == []
