"""Two releases never both win: processes that promote at the same moment, on every database."""

from __future__ import annotations

from benchmarks.races import race

from meristem.store.store import Store


def check(place, rounds):
    store = Store(*place)
    store.database.create()
    store.database.close()
    told = race((str(place[0]), place[1]), 8, rounds)
    assert told["rounds with one winner"] == rounds, told
    assert told["told that the champion moved"] == 7 * rounds and told["other errors"] == []
    assert told["releases"] == rounds and told["champion revision"] == rounds + 1
    assert told["problems found by log verify"] == []


def test_one_of_eight_wins_on_sqlite(tmp_path):
    check((tmp_path, None), 8)


def test_one_of_eight_wins_on_postgresql(tmp_path, postgresql_url):
    check((tmp_path, postgresql_url()), 8)
