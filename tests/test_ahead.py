"""Reading ahead keeps the order, keeps to its bound, and passes errors on when their turn comes."""

import threading

import pytest

from captum_scoremap.data.ahead import map_ahead


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ahead", [1, 4, 100])
def test_the_order_is_that_of_map(threads, ahead):
    assert list(map_ahead(lambda number: number**2, range(20), ahead, threads)) == [n**2 for n in range(20)]


@pytest.mark.parametrize("ahead", [1, 5])
def test_never_further_ahead_than_asked_for(ahead):
    made = threading.Semaphore(0)
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    results = map_ahead(lambda _: made.release(), items(), ahead)
    assert taken == []
    for number, _ in enumerate(results):
        assert len(taken) == min(number + 1 + ahead, 20)
        # The next is made although nobody asks for it.
        assert number == 19 or made.acquire(timeout=60)


def test_an_error_comes_in_its_turn_and_ends_the_threads():
    def shy(number):
        if number == 2:
            raise OSError("torn")
        return number

    before = threading.active_count()
    results = map_ahead(shy, range(10), ahead=5)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="torn"):
        next(results)
    assert threading.active_count() == before


def test_closing_ends_the_threads():
    before = threading.active_count()
    results = map_ahead(str, range(10), ahead=5)
    assert next(results) == "0"
    results.close()
    assert threading.active_count() == before
