//! A hierarchical timing wheel: six levels of 64 buckets; a bucket of the finest level is one tick of a millisecond.
//!
//! The cost of arming, refreshing and cancelling does not depend on the number of timers. A refresh to a *later*
//! deadline, as an idle timeout does on each message, stores one integer: the node stays in its bucket, and is moved
//! only when that bucket is due.
//!
//! The time is an argument: the caller counts the ticks, so that tests need not wait.
//!
//! Invariants:
//! - A node is in exactly one bucket, and that bucket is due no later than the node's deadline.
//! - Each key is returned once, not before its deadline, in the order of the deadlines.

use std::collections::TryReserveError;

/// Milliseconds since the reactor started.
pub(crate) type Tick = u64;

const LEVELS: usize = 6;
const LEVEL_BITS: u32 = 6;
const BUCKETS: usize = 1 << LEVEL_BITS;
/// The span of the wheel (about two years). Nodes with later deadlines wait in the last bucket and are moved from there.
const REACH_TICKS: Tick =
    (1 << (LEVEL_BITS * LEVELS as u32)) - (1 << (LEVEL_BITS * (LEVELS as u32 - 1))) - 1;
/// A wheel that has used more nodes than this returns its memory when it becomes empty.
const KEEP_NODES_MAX: usize = 4096;

const NO_NODE: u32 = u32::MAX;
/// A flag in `Node::previous`: the node is the first of its bucket, whose number is in the other bits.
const FIRST_OF_BUCKET: u32 = 1 << 31;

/// The index of a node, which the owner of the timer stores, in four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeId(u32);

impl NodeId {
    /// No timer. An `Option` would take four bytes more.
    pub(crate) const NONE: NodeId = NodeId(NO_NODE);
}

#[derive(Debug)]
struct Node {
    key: u64,
    deadline: Tick,
    next: u32,
    previous: u32,
}

/// The size of an armed timer.
pub(crate) const NODE_BYTES: usize = size_of::<Node>();

#[derive(Debug)]
pub(crate) struct Wheel {
    nodes: Vec<Node>,
    capacity: usize,
    free_first: u32,
    len: usize,
    /// All buckets before this tick have been processed.
    elapsed: Tick,
    levels: [Level; LEVELS],
}

#[derive(Debug)]
struct Level {
    /// Bit n is set if bucket n contains a node.
    occupied: u64,
    first: [u32; BUCKETS],
}

impl Wheel {
    /// Reserves address space for `capacity` timers. More are possible, but then growth copies.
    pub(crate) fn with_capacity(capacity: usize) -> Result<Self, TryReserveError> {
        let mut nodes = Vec::new();
        nodes.try_reserve_exact(capacity)?;
        Ok(Self {
            nodes,
            capacity,
            free_first: NO_NODE,
            len: 0,
            elapsed: 0,
            levels: std::array::from_fn(|_| Level { occupied: 0, first: [NO_NODE; BUCKETS] }),
        })
    }

    /// The number of armed timers.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Arms a timer that returns `key` when `deadline` is reached.
    pub(crate) fn insert(&mut self, deadline: Tick, key: u64) -> NodeId {
        let node = Node { key, deadline, next: NO_NODE, previous: NO_NODE };
        let id = match self.free_first {
            NO_NODE => {
                self.nodes.push(node);
                self.nodes.len() as u32 - 1
            }
            id => {
                self.free_first = self.nodes[id as usize].next;
                self.nodes[id as usize] = node;
                id
            }
        };
        self.len += 1;
        self.link(id);
        NodeId(id)
    }

    /// Changes the deadline of an armed timer.
    pub(crate) fn set_deadline(&mut self, id: NodeId, deadline: Tick) {
        let node = &mut self.nodes[id.0 as usize];
        let sooner = deadline < node.deadline;
        node.deadline = deadline;
        if sooner {
            self.unlink(id.0);
            self.link(id.0);
        }
    }

    /// Disarms a timer.
    pub(crate) fn remove(&mut self, id: NodeId) {
        self.unlink(id.0);
        self.free(id.0);
    }

    /// The tick at which the wheel must be polled next: not later than the first deadline, but possibly earlier.
    pub(crate) fn next_tick(&self) -> Option<Tick> {
        self.next_bucket().map(|(_, _, start)| start)
    }

    /// Disarms a timer whose deadline is reached and returns its key.
    ///
    /// Each node that is visited takes one from `budget`. At 0 the result is `None`, even if more timers are due.
    pub(crate) fn poll(&mut self, now: Tick, budget: &mut u32) -> Option<u64> {
        loop {
            let Some((level, bucket, start)) = self.next_bucket() else {
                self.elapsed = self.elapsed.max(now);
                return None;
            };
            if start > now {
                self.elapsed = self.elapsed.max(now);
                return None;
            }
            if *budget == 0 {
                return None;
            }
            *budget -= 1;
            self.elapsed = self.elapsed.max(start);
            let id = self.levels[level].first[bucket];
            self.unlink(id);
            let node = &self.nodes[id as usize];
            // Not compared with `now`: the nodes of a coarse bucket are unordered, and are sorted into finer ones.
            if node.deadline <= self.elapsed {
                let key = node.key;
                self.free(id);
                return Some(key);
            }
            self.link(id);
        }
    }

    /// The first occupied bucket: its level, its number and the tick at which it starts.
    fn next_bucket(&self) -> Option<(usize, usize, Tick)> {
        if self.len == 0 {
            return None;
        }
        let first_of = |level: usize| {
            let occupied = self.levels[level].occupied;
            if occupied == 0 {
                return None;
            }
            let shift = LEVEL_BITS * level as u32;
            let here = (self.elapsed >> shift) as usize % BUCKETS;
            let ahead = occupied.rotate_right(here as u32).trailing_zeros() as usize;
            let start = ((self.elapsed >> shift) + ahead as Tick) << shift;
            Some((level, (here + ahead) % BUCKETS, start))
        };
        // A partly processed coarse bucket can start before the first fine one, so all levels are compared.
        (0..LEVELS).filter_map(first_of).min_by_key(|&(_, _, start)| start)
    }

    fn link(&mut self, id: u32) {
        let due = self.nodes[id as usize].deadline.clamp(self.elapsed, self.elapsed + REACH_TICKS);
        let level = level_of(self.elapsed, due);
        let bucket = (due >> (LEVEL_BITS * level as u32)) as usize % BUCKETS;
        let first = self.levels[level].first[bucket];
        if first != NO_NODE {
            self.nodes[first as usize].previous = id;
        }
        let node = &mut self.nodes[id as usize];
        node.next = first;
        node.previous = FIRST_OF_BUCKET | (level * BUCKETS + bucket) as u32;
        self.levels[level].first[bucket] = id;
        self.levels[level].occupied |= 1 << bucket;
    }

    fn unlink(&mut self, id: u32) {
        let Node { next, previous, .. } = self.nodes[id as usize];
        if next != NO_NODE {
            self.nodes[next as usize].previous = previous;
        }
        if previous & FIRST_OF_BUCKET == 0 {
            self.nodes[previous as usize].next = next;
            return;
        }
        let place = (previous & !FIRST_OF_BUCKET) as usize;
        let level = &mut self.levels[place / BUCKETS];
        level.first[place % BUCKETS] = next;
        if next == NO_NODE {
            level.occupied &= !(1 << (place % BUCKETS));
        }
    }

    fn free(&mut self, id: u32) {
        self.nodes[id as usize].next = self.free_first;
        self.free_first = id;
        self.len -= 1;
        if self.len == 0 && self.nodes.len() > KEEP_NODES_MAX {
            let mut fresh = Vec::new();
            if fresh.try_reserve_exact(self.capacity).is_ok() {
                self.nodes = fresh;
                self.free_first = NO_NODE;
            }
        }
    }
}

/// The level is that of the highest group of six bits in which the deadline differs from the elapsed time.
fn level_of(elapsed: Tick, due: Tick) -> usize {
    let differing = (elapsed ^ due) | (BUCKETS as Tick - 1);
    let level = (Tick::BITS - 1 - differing.leading_zeros()) / LEVEL_BITS;
    (level as usize).min(LEVELS - 1)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use proptest::prelude::*;

    use super::*;

    /// Fewer under Miri, which is a thousand times slower.
    const STEPS_MAX: usize = if cfg!(miri) { 30 } else { 200 };

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Tick),
        /// A deadline in the past.
        InsertLate(Tick),
        Refresh(usize, Tick),
        Remove(usize),
        /// Time passes, then due timers are polled with this budget.
        Poll(Tick, u32),
    }

    /// All magnitudes are equally likely, so that every level is used.
    fn span() -> impl Strategy<Value = Tick> {
        (0..42u32, any::<Tick>()).prop_map(|(bits, random)| random & ((1 << bits) - 1))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => span().prop_map(Step::Insert),
            1 => span().prop_map(Step::InsertLate),
            1 => Just(Step::Insert(Tick::MAX / 4)),
            3 => (any::<usize>(), span()).prop_map(|(which, span)| Step::Refresh(which, span)),
            2 => any::<usize>().prop_map(Step::Remove),
            4 => (span(), prop_oneof![Just(u32::MAX), 0..8u32]).prop_map(|(span, budget)| Step::Poll(span, budget)),
        ]
    }

    /// A wheel, and a map from key to deadline as its model.
    struct Pair {
        wheel: Wheel,
        model: HashMap<u64, (NodeId, Tick)>,
        armed: Vec<u64>,
        now: Tick,
        next_key: u64,
        /// The deadline of the last returned key. A deadline that was in the past when it was set counts as the time then.
        last: Tick,
    }

    impl Pair {
        fn new() -> Self {
            Self {
                wheel: Wheel::with_capacity(16).unwrap(),
                model: HashMap::new(),
                armed: Vec::new(),
                now: 0,
                next_key: 0,
                last: 0,
            }
        }

        fn take(&mut self, step: Step) {
            match step {
                Step::Insert(span) => self.insert(self.now.saturating_add(span)),
                Step::InsertLate(span) => self.insert(self.now.saturating_sub(span)),
                Step::Refresh(which, span) => {
                    if let Some(key) = self.pick(which) {
                        let (id, deadline) = self.model.get_mut(&key).unwrap();
                        *deadline = self.now + span;
                        self.wheel.set_deadline(*id, *deadline);
                    }
                }
                Step::Remove(which) => {
                    if let Some(key) = self.pick(which) {
                        let (id, _) = self.model.remove(&key).unwrap();
                        self.armed.retain(|&other| other != key);
                        self.wheel.remove(id);
                    }
                }
                Step::Poll(span, budget) => {
                    self.now += span;
                    self.poll(budget);
                }
            }
        }

        fn pick(&self, which: usize) -> Option<u64> {
            (!self.armed.is_empty()).then(|| self.armed[which % self.armed.len()])
        }

        fn insert(&mut self, deadline: Tick) {
            let key = self.next_key;
            self.next_key += 1;
            let id = self.wheel.insert(deadline, key);
            self.model.insert(key, (id, deadline.max(self.wheel.elapsed)));
            self.armed.push(key);
        }

        fn poll(&mut self, budget: u32) {
            let mut left = budget;
            while let Some(key) = self.wheel.poll(self.now, &mut left) {
                let (_, deadline) = self.model.remove(&key).expect("a key was returned twice");
                self.armed.retain(|&other| other != key);
                assert!(
                    deadline <= self.now,
                    "{key} was returned {} ticks early",
                    deadline - self.now
                );
                assert!(self.last <= deadline, "{deadline} was returned after {}", self.last);
                self.last = deadline;
            }
            if left > 0 {
                let late = self.model.values().find(|(_, deadline)| *deadline <= self.now);
                assert!(late.is_none(), "{late:?} is overdue at {}", self.now);
            }
        }

        fn compare(&self) {
            assert_eq!(self.wheel.len(), self.model.len());
            let first = self.model.values().map(|&(_, deadline)| deadline).min();
            let next = self.wheel.next_tick();
            assert_eq!(next.is_some(), first.is_some());
            if let (Some(next), Some(first)) = (next, first) {
                assert!(next <= first, "{next} is after {first}");
            }
        }

        /// Disarms timers that would take too many turns to reach.
        fn remove_beyond(&mut self, tick: Tick) {
            let wheel = &mut self.wheel;
            self.model.retain(|_, &mut (id, deadline)| {
                if deadline > tick {
                    wheel.remove(id);
                }
                deadline <= tick
            });
        }

        /// Polls until the wheel is empty, like a loop that waits for `next_tick`.
        fn run_out(&mut self) {
            let mut turns = 0;
            while let Some(next) = self.wheel.next_tick() {
                self.now = self.now.max(next);
                self.poll(u32::MAX);
                self.compare();
                turns += 1;
                assert!(turns < 100_000, "the wheel does not become empty");
            }
            assert!(self.model.is_empty());
        }
    }

    proptest! {
        #[test]
        fn it_behaves_like_a_sorted_map(steps in prop::collection::vec(step(), 1..STEPS_MAX)) {
            let mut pair = Pair::new();
            for step in steps {
                pair.take(step);
                pair.compare();
            }
            pair.remove_beyond(pair.now + (1 << 45));
            pair.run_out();
        }

        #[test]
        fn timers_fire_in_the_order_of_their_deadlines(
            deadlines in prop::collection::vec(span(), 1..STEPS_MAX),
            late in span(),
        ) {
            let mut wheel = Wheel::with_capacity(0).unwrap();
            for &deadline in &deadlines {
                wheel.insert(deadline, deadline);
            }
            let mut came = Vec::new();
            while let Some(next) = wheel.next_tick() {
                while let Some(deadline) = wheel.poll(next + late, &mut u32::MAX.clone()) {
                    came.push(deadline);
                }
            }
            let mut sorted = deadlines;
            sorted.sort_unstable();
            prop_assert_eq!(came, sorted);
        }
    }

    fn numbers(mut seed: u64) -> impl FnMut(u64) -> u64 {
        move |below| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        }
    }

    #[test]
    fn a_million_timers_fire_once_each_and_on_time() {
        const TIMERS: u64 = 1_000_000;
        const SPAN: Tick = 120_000;
        let mut number = numbers(7);
        let mut wheel = Wheel::with_capacity(TIMERS as usize).unwrap();
        let mut deadlines = vec![0; TIMERS as usize];
        let mut ids = Vec::new();
        for key in 0..TIMERS {
            deadlines[key as usize] = number(SPAN);
            ids.push(wheel.insert(deadlines[key as usize], key));
        }
        // Half of the timers get a later or an earlier deadline, and some are disarmed.
        for _ in 0..TIMERS / 2 {
            let key = number(TIMERS) as usize;
            deadlines[key] = number(SPAN);
            wheel.set_deadline(ids[key], deadlines[key]);
        }
        for key in (0..TIMERS as usize).step_by(10) {
            wheel.remove(ids[key]);
            deadlines[key] = Tick::MAX;
        }
        let mut came = 0;
        let (mut before, mut now) = (None, 0);
        while let Some(next) = wheel.next_tick() {
            now = next.max(now) + number(50);
            while let Some(key) = wheel.poll(now, &mut u32::MAX.clone()) {
                let deadline = std::mem::replace(&mut deadlines[key as usize], Tick::MAX);
                assert!(deadline <= now, "a timer fired early");
                assert!(Some(deadline) > before, "the timer was already due at the previous poll");
                came += 1;
            }
            before = Some(now);
        }
        assert_eq!(came, TIMERS - TIMERS / 10);
        assert_eq!(wheel.len(), 0);
        assert!(wheel.nodes.is_empty(), "the memory was not returned");
    }

    #[test]
    fn a_deadline_beyond_reach_is_kept() {
        let mut wheel = Wheel::with_capacity(1).unwrap();
        let deadline = REACH_TICKS * 3 + 12_345;
        wheel.insert(deadline, 1);
        let mut now = 0;
        let mut looks = 0;
        let key = loop {
            now = now.max(wheel.next_tick().unwrap());
            looks += 1;
            if let Some(key) = wheel.poll(now, &mut u32::MAX.clone()) {
                break key;
            }
        };
        assert_eq!((key, now), (1, deadline));
        assert!(looks < 20, "{looks} looks");
    }

    #[test]
    fn the_last_tick_can_be_a_deadline() {
        let mut wheel = Wheel::with_capacity(1).unwrap();
        let id = wheel.insert(Tick::MAX, 1);
        assert_eq!(wheel.poll(REACH_TICKS * 100, &mut u32::MAX.clone()), None);
        wheel.set_deadline(id, REACH_TICKS * 100 + 1);
        assert_eq!(wheel.poll(REACH_TICKS * 100 + 1, &mut u32::MAX.clone()), Some(1));
    }

    #[test]
    fn a_refresh_to_later_moves_no_node() {
        const LAST: Tick = if cfg!(miri) { 999 } else { 9_999 };
        let mut wheel = Wheel::with_capacity(1).unwrap();
        let id = wheel.insert(100, 1);
        let before = wheel.next_tick();
        for later in 101..=LAST {
            wheel.set_deadline(id, later);
            assert_eq!(wheel.next_tick(), before);
        }
        assert_eq!(wheel.poll(LAST - 1, &mut u32::MAX.clone()), None);
        assert_eq!(wheel.poll(LAST, &mut u32::MAX.clone()), Some(1));
    }

    #[test]
    fn a_budget_that_ends_half_way_through_a_bucket_loses_nothing() {
        const MEANWHILE: Tick = if cfg!(miri) { 80 } else { 200 };
        const FAR: Tick = if cfg!(miri) { 300 } else { 5_000 };
        let mut wheel = Wheel::with_capacity(256).unwrap();
        let mut left = BTreeMap::new();
        // All deadlines are in one bucket of the second level.
        for key in 0..100 {
            let deadline = 64 + key % 64;
            wheel.insert(deadline, key);
            left.insert(key, deadline);
        }
        let mut key = 1000;
        for now in 64.. {
            for _ in 0..3 {
                if let Some(due) = wheel.poll(now, &mut 1) {
                    assert!(left.remove(&due).unwrap() <= now);
                }
            }
            // The new deadlines are before, within and after the partly processed bucket.
            if now < MEANWHILE {
                for deadline in [now - 1, now, now + 1, now + 63, now + 64, now + FAR] {
                    wheel.insert(deadline, key);
                    left.insert(key, deadline);
                    key += 1;
                }
            }
            let first = left.values().copied().min();
            assert!(wheel.next_tick() <= first.max(Some(wheel.elapsed)));
            if left.is_empty() {
                break;
            }
            assert!(now < 20_000, "{} timers did not fire", left.len());
        }
        assert_eq!(wheel.len(), 0);
    }

    #[test]
    fn without_budget_nothing_changes() {
        let mut wheel = Wheel::with_capacity(1).unwrap();
        wheel.insert(10, 1);
        assert_eq!(wheel.poll(1 << 40, &mut 0), None);
        assert_eq!(wheel.next_tick(), Some(10));
        assert_eq!(wheel.poll(1 << 40, &mut 1), Some(1));
    }
}
