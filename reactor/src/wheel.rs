//! A hierarchical timing wheel: six levels of 64 buckets, one tick of a millisecond at the finest.
//!
//! Arming, refreshing and cancelling cost the same whether ten timers are armed or ten million. A refresh to a *later*
//! deadline, which is what an idle timeout does on each message, stores one integer: the node stays in the bucket where
//! it is, and moves on only when that bucket comes up.
//!
//! Time is an argument here: ticks are counted by the caller, so that tests run hours in a moment.
//!
//! Invariants:
//! - A node hangs in exactly one bucket, and that bucket comes up no later than the node's deadline.
//! - No key is given out before its deadline, and each key once.

use std::collections::TryReserveError;

/// Milliseconds since the reactor started.
pub(crate) type Tick = u64;

const LEVELS: usize = 6;
const LEVEL_BITS: u32 = 6;
const BUCKETS: usize = 1 << LEVEL_BITS;
/// How far ahead a bucket can be (about two years); later deadlines wait in the last bucket and are looked at again.
const REACH_TICKS: Tick =
    (1 << (LEVEL_BITS * LEVELS as u32)) - (1 << (LEVEL_BITS * (LEVELS as u32 - 1))) - 1;
/// A wheel that has touched more nodes than this gives its memory back when it becomes empty.
const KEEP_NODES_MAX: usize = 4096;

const NO_NODE: u32 = u32::MAX;
/// In `Node::previous`: the node is the first of the bucket whose number is in the other bits.
const FIRST_OF_BUCKET: u32 = 1 << 31;

/// The place of a node: what the owner of the timer keeps, in four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeId(u32);

impl NodeId {
    /// Stands for "no timer" where an `Option` would cost four bytes more.
    pub(crate) const NONE: NodeId = NodeId(NO_NODE);
}

#[derive(Debug)]
struct Node {
    key: u64,
    deadline: Tick,
    next: u32,
    previous: u32,
}

/// The bytes of one armed timer.
pub(crate) const NODE_BYTES: usize = size_of::<Node>();

#[derive(Debug)]
pub(crate) struct Wheel {
    nodes: Vec<Node>,
    capacity: usize,
    free_first: u32,
    len: usize,
    /// Everything in buckets before this tick has been dealt with.
    elapsed: Tick,
    levels: [Level; LEVELS],
}

#[derive(Debug)]
struct Level {
    /// Bit n is set when bucket n holds a node.
    occupied: u64,
    first: [u32; BUCKETS],
}

impl Wheel {
    /// Reserves address space for `capacity` timers; more than that are possible, at the price of a copy.
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

    /// How many timers are armed.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Arms a timer that gives out `key` once `deadline` is reached.
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

    /// Moves the deadline of an armed timer.
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

    /// When the wheel wants to be polled next: never later than the first deadline, possibly sooner.
    pub(crate) fn next_tick(&self) -> Option<Tick> {
        self.next_bucket().map(|(_, _, start)| start)
    }

    /// The key of one timer whose deadline is reached, which is disarmed by that.
    ///
    /// Each node that is looked at takes one from `budget`; at 0 the answer is `None`, though more may be due.
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
            if node.deadline <= now {
                let key = node.key;
                self.free(id);
                return Some(key);
            }
            self.link(id);
        }
    }

    /// The occupied bucket that comes up first: its level, its number and the tick at which it starts.
    fn next_bucket(&self) -> Option<(usize, usize, Tick)> {
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
        // A coarse bucket that is half dealt with can start before the finest one: all levels count.
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

/// The level is that of the highest group of six bits in which the deadline differs from now.
fn level_of(elapsed: Tick, due: Tick) -> usize {
    let differing = (elapsed ^ due) | (BUCKETS as Tick - 1);
    let level = (Tick::BITS - 1 - differing.leading_zeros()) / LEVEL_BITS;
    (level as usize).min(LEVELS - 1)
}
