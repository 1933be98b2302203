"""The memory of continuous batching: no slot is given twice, none is lost, and shared ones hold the same prompt."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from eso_lm.batching_memory import MIN_SHARED, SlotMemory, num_in_common, prompt_key

NUM_SLOTS = 160
# Few beginnings and few lengths, so that prompts have much in common.
PROMPTS = st.tuples(st.integers(0, 2), st.integers(0, 70), st.integers(0, 1)).map(
    lambda drawn: [drawn[0]] * drawn[1] + [9 + drawn[2]] * 3
)


def key_of(tokens: list[int]) -> torch.Tensor:
    return prompt_key(torch.tensor(tokens, dtype=torch.long), torch.arange(len(tokens)))


class Tenants(RuleBasedStateMachine):
    """Texts come and go; what each slot holds is written down here, by its own count."""

    def __init__(self):
        super().__init__()
        self.memory = SlotMemory(NUM_SLOTS)
        self.texts: dict[str, list[int]] = {}
        self.owned: dict[str, set[int]] = {}
        self.read: set[str] = set()
        self.contents: dict[int, tuple[int, int]] = {}  # of each slot whose content counts: token and position
        self.num_names = 0

    def places(self, name: str) -> list[int]:
        lease = self.memory.leases[name]
        return lease.places(0, lease.num_slots).tolist()

    @rule(tokens=PROMPTS, further=st.integers(1, 40))
    def joins(self, tokens, further):
        name = f"text {self.num_names}"
        self.num_names += 1
        free, held = self.memory.num_free, {slot for name in self.texts for slot in self.places(name)}
        lease = self.memory.take(name, len(tokens) + further, key_of(tokens))
        if lease is None:
            # Not even all that nobody uses would do; a shared beginning can only have been worth less than the rest.
            assert NUM_SLOTS - len(held) < len(tokens) + further
            assert self.memory.num_free >= free
            return
        places = self.places(name)
        assert lease.num_slots == len(tokens) + further == len(set(places))
        assert lease.num_shared <= len(tokens)
        assert lease.num_shared == 0 or lease.num_shared >= MIN_SHARED
        # What is shared holds what it says.
        for position, slot in enumerate(places[: lease.num_shared]):
            assert self.contents[slot] == (tokens[position], position)
        own = set(places[lease.num_shared :])
        assert not own & held
        self.texts[name], self.owned[name] = tokens, own
        for slot in own:
            self.contents.pop(slot, None)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def reads_its_prompt(self, data):
        name = data.draw(st.sampled_from(sorted(self.texts)))
        places = self.places(name)
        for position, token in enumerate(self.texts[name]):
            self.contents[places[position]] = (token, position)
        if name not in self.read:
            self.read.add(name)
            self.memory.keep_prompt(name)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def leaves(self, data):
        name = data.draw(st.sampled_from(sorted(self.texts)))
        self.memory.free_blocks(name)
        self.memory.free_blocks(name)  # twice is once
        del self.texts[name], self.owned[name]
        self.read.discard(name)

    @rule()
    def forgets_prompts(self):
        self.memory.forget_prompts()

    @invariant()
    def every_slot_has_one_owner(self):
        seen: set[int] = set()
        for own in self.owned.values():
            assert not own & seen
            seen |= own
        holes = [slot for start, stop in self.memory._holes for slot in range(start, stop)]
        assert len(holes) == len(set(holes)) == self.memory.num_free
        leased = {slot for name in self.texts for slot in self.places(name)}
        kept = {
            slot
            for prompt in self.memory._kept
            for stretch, count in prompt.pieces
            for slot in range(stretch.start, stretch.start + count)
        }
        assert not set(holes) & (leased | kept)
        # None is lost: what is neither free nor kept is leased, all of it.
        assert set(range(NUM_SLOTS)) - set(holes) == leased | kept
        assert self.memory.num_in_use >= len(leased)

    @invariant()
    def kept_prompts_are_there(self):
        for prompt in self.memory._kept:
            slots = [slot for stretch, count in prompt.pieces for slot in range(stretch.start, stretch.start + count)]
            assert [list(pair) for pair in prompt.key.T.tolist()] == [list(self.contents[slot]) for slot in slots]

    def teardown(self):
        for name in self.texts:
            self.memory.free_blocks(name)
        self.memory.forget_prompts()
        assert self.memory._holes == [(0, NUM_SLOTS)]
        assert self.memory.num_in_use == 0


TestTenants = Tenants.TestCase
TestTenants.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_text_takes_the_smallest_hole_that_is_large_enough_and_otherwise_several():
    memory = SlotMemory(100, shares_prompts=False)
    nothing = key_of([])
    for name, length in (("a", 20), ("b", 10), ("c", 30), ("d", 10), ("e", 30)):
        memory.take(name, length, nothing)
    memory.free_blocks("a")
    memory.free_blocks("c")
    assert memory.take("f", 20, nothing).slices(0, 20) == [slice(0, 20)]
    memory.free_blocks("e")
    assert memory.take("g", 50, nothing).slices(0, 50) == [slice(30, 60), slice(70, 90)]
    assert memory.take("h", 11, nothing) is None
    assert memory.take("i", 10, nothing).slices(4, 10) == [slice(94, 100)]


def test_prompts_agree_as_far_as_tokens_and_positions_do():
    tokens, positions = torch.tensor([5, 6, 7, 8]), torch.arange(4)
    shifted = prompt_key(tokens, torch.tensor([0, 1, 3, 4]))
    assert num_in_common(prompt_key(tokens, positions), shifted) == 2
    assert num_in_common(prompt_key(tokens, positions), prompt_key(tokens[:3], positions[:3])) == 3
    assert num_in_common(prompt_key(tokens[:0], positions[:0]), shifted) == 0


def test_prompts_are_not_shared_where_that_is_switched_off():
    memory = SlotMemory(200, shares_prompts=False)
    memory.take("a", 60, key_of([1] * 50))
    memory.keep_prompt("a")
    assert memory.take("b", 60, key_of([1] * 50)).num_shared == 0


def test_the_prompt_that_has_been_of_no_use_for_longest_makes_room():
    memory = SlotMemory(100)
    for name, token in (("a", 1), ("b", 2)):
        memory.take(name, 30, key_of([token] * 30))
        memory.keep_prompt(name)
        memory.free_blocks(name)
    assert memory.take("again", 40, key_of([1] * 30)).num_shared == 30
    memory.free_blocks("again")
    memory.take("large", 60, key_of([3] * 20))
    assert memory.num_shareable(key_of([1] * 30)) == 30
    assert memory.num_shareable(key_of([2] * 30)) == 0


def test_a_new_prompt_is_compared_with_the_last_of_those_that_begin_as_it_does(monkeypatch):
    monkeypatch.setattr("eso_lm.batching_memory.MAX_COMPARED", 2)
    memory = SlotMemory(1000)
    for length in (60, 40, 50):
        memory.take(f"{length}", length + 20, key_of([1] * length + [2] * 20))
        memory.keep_prompt(f"{length}")
    assert memory.num_shareable(key_of([1] * 90)) == 50
