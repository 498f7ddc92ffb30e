"""Pages with counted users, and pages that are remembered by their tokens."""

import random

import pytest

from granite_speech.engine.pages import PAGE_SIZE, Pages, prefixes_of


def prefixes(*tokens, has_audio=True):
    return prefixes_of(list(tokens), has_audio=has_audio)


def test_only_whole_pages_have_a_prefix_and_it_depends_on_all_tokens_before():
    ids = list(range(3 * PAGE_SIZE - 1))
    assert len(prefixes(*ids)) == 2
    assert prefixes(*ids)[:1] == prefixes(*ids[:PAGE_SIZE])
    changed = prefixes(*[-1, *ids[1:]])
    assert not set(changed) & set(prefixes(*ids))
    assert not set(prefixes(*ids, has_audio=False)) & set(prefixes(*ids))
    assert prefixes(*ids[: PAGE_SIZE - 1]) == []


def test_pages_are_handed_out_once_and_come_back():
    pages = Pages(range(1, 6))
    first, second = pages.take(2), pages.take(3)
    assert sorted([*first, *second]) == [1, 2, 3, 4, 5]
    assert pages.take(1) is None and pages.take(0) == []
    pages.give_back(first)
    assert (pages.available, pages.used) == (2, 3)
    assert sorted(pages.take(2)) == sorted(first)


def test_a_page_with_two_users_comes_back_after_the_second():
    pages, known = Pages(range(1, 4)), prefixes(*range(PAGE_SIZE))
    [own] = pages.take(1)
    pages.remember(known, [own])
    assert pages.find(known) == [own]
    pages.give_back([own])
    assert pages.used == 1 and len(pages.take(2)) == 2 and pages.take(1) is None
    pages.give_back([own])
    assert pages.take(1) == [own], "forgotten, because nothing else is free"
    assert pages.find(known) == [] and pages.remembered == 0


def test_the_beginning_unused_for_the_longest_time_is_forgotten_first():
    pages = Pages(range(1, 4))
    known = [prefixes(*range(start, start + PAGE_SIZE)) for start in (0, 1, 2)]
    for one in known:
        taken = pages.take(1)
        pages.remember(one, taken)
        pages.give_back(taken)
    pages.give_back(pages.find(known[0]))
    pages.take(1)
    assert [pages.is_remembered(one[0]) for one in known] == [True, False, True]


def test_find_stops_at_the_first_unknown_page():
    pages, known = Pages(range(1, 9)), prefixes(*range(3 * PAGE_SIZE))
    taken = pages.take(3)
    pages.remember(known[:1], taken[:1])
    pages.remember(known[2:], taken[2:])
    assert pages.find(known) == taken[:1]


@pytest.mark.parametrize("seed", range(5))
def test_no_page_is_lost_or_used_twice(seed):
    """Random users against a model that counts by hand."""
    dice, pages = random.Random(seed), Pages(range(1, 30))
    families = [prefixes(*range(start, start + 3 * PAGE_SIZE)) for start in range(6)]
    held = []
    for _ in range(2000):
        if held and dice.random() < 0.5:
            pages.give_back(held.pop(dice.randrange(len(held))))
            continue
        known = dice.choice(families)
        shared = pages.find(known)
        own = pages.take(dice.randint(3 - len(shared), 6))
        if own is None:
            pages.give_back(shared)
            continue
        everything = shared + own
        pages.remember(known, everything[:3])
        held.append(everything)
        used = {page for one in held for page in one}
        assert pages.used == len(used) and pages.available == 29 - len(used)
        assert not {page for one in held[:-1] for page in one} & set(own)
    for one in held:
        pages.give_back(one)
    assert (pages.used, pages.available) == (0, 29)
    assert len(pages.take(29)) == 29
