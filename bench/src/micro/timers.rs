//! The reactor's wheel, tokio-util's `DelayQueue` and a binary heap.
//!
//! The workload is that of idle timeouts: armed once, moved many times at random, and fired at the end. All deadlines
//! are within a few seconds of the start, because `DelayQueue` uses the real clock. Nothing is fired until all have
//! passed, so that each structure has the same work.
//!
//! The heap holds (deadline, id). As usual, an entry stays in place when its deadline moves to later, and is inserted
//! again when it is popped. For an earlier deadline a second entry is needed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::poll_fn;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use tokio::task::unconstrained;
use tokio::time::Instant;
use tokio_util::time::DelayQueue;

use crate::wheel::Wheel;
use crate::{Numbers, time_each};

const MOVES: usize = 1_000_000;

/// In milliseconds: deadlines are first in the first range, then moved to the others.
const FIRST: (usize, usize) = (1_000, 2_000);
const LATER: (usize, usize) = (2_000, 3_000);
const ANYWHERE: (usize, usize) = (1_000, 3_000);
const END: u64 = 3_001;

type Note<'a> = &'a mut dyn FnMut(&'static str, f64);

pub(super) fn run(
    entries: usize,
    note: &mut dyn FnMut(&'static str, &'static str, f64),
) -> io::Result<()> {
    wheel(entries, &mut |operation, ns| note("reactor's wheel", operation, ns));
    heap(entries, &mut |operation, ns| note("BinaryHeap", operation, ns));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(delay_queue(entries, &mut |operation, ns| note("DelayQueue", operation, ns)));
    Ok(())
}

fn within(numbers: &mut Numbers, (from, to): (usize, usize)) -> u64 {
    (from + numbers.below(to - from)) as u64
}

fn wheel(entries: usize, note: Note<'_>) {
    let Ok(mut wheel) = Wheel::with_capacity(entries) else { return };
    let mut numbers = Numbers::new();
    let mut nodes = Vec::with_capacity(entries);
    note(
        "arm",
        time_each(entries, || {
            for key in 0..entries as u64 {
                nodes.push(wheel.insert(within(&mut numbers, FIRST), key));
            }
        }),
    );
    for (operation, range) in [("move to later", LATER), ("move anywhere", ANYWHERE)] {
        note(
            operation,
            time_each(MOVES, || {
                for _ in 0..MOVES {
                    let node = nodes[numbers.below(entries)];
                    wheel.set_deadline(node, within(&mut numbers, range));
                }
            }),
        );
    }
    let mut fired = 0;
    note(
        "fire",
        time_each(entries, || {
            // Limited per turn, as in the reactor.
            while wheel.len() > 0 {
                let mut budget = 4096;
                while wheel.poll(END, &mut budget).is_some() {
                    fired += 1;
                }
            }
        }),
    );
    assert_eq!(fired, entries, "each timer fires once");
}

fn heap(entries: usize, note: Note<'_>) {
    let mut numbers = Numbers::new();
    let mut heap = BinaryHeap::with_capacity(entries);
    let mut deadlines = vec![0; entries];
    note(
        "arm",
        time_each(entries, || {
            for (id, deadline) in deadlines.iter_mut().enumerate() {
                *deadline = within(&mut numbers, FIRST);
                heap.push(Reverse((*deadline, id as u32)));
            }
        }),
    );
    for (operation, range) in [("move to later", LATER), ("move anywhere", ANYWHERE)] {
        note(
            operation,
            time_each(MOVES, || {
                for _ in 0..MOVES {
                    let id = numbers.below(entries);
                    let deadline = within(&mut numbers, range);
                    if deadline < deadlines[id] {
                        heap.push(Reverse((deadline, id as u32)));
                    }
                    deadlines[id] = deadline;
                }
            }),
        );
    }
    let mut fired = 0;
    note(
        "fire",
        time_each(entries, || {
            while let Some(Reverse((deadline, id))) = heap.pop() {
                let wanted = &mut deadlines[id as usize];
                if *wanted == deadline {
                    *wanted = u64::MAX;
                    fired += 1;
                } else if *wanted != u64::MAX && *wanted > deadline {
                    heap.push(Reverse((*wanted, id)));
                }
            }
        }),
    );
    assert_eq!(fired, entries, "each timer fires once");
}

async fn delay_queue(entries: usize, note: Note<'_>) {
    let mut numbers = Numbers::new();
    let mut queue = DelayQueue::with_capacity(entries);
    let mut keys = Vec::with_capacity(entries);
    let start = Instant::now();
    let at = |ms: u64| start + Duration::from_millis(ms);
    note(
        "arm",
        time_each(entries, || {
            for id in 0..entries as u64 {
                keys.push(queue.insert_at(id, at(within(&mut numbers, FIRST))));
            }
        }),
    );
    for (operation, range) in [("move to later", LATER), ("move anywhere", ANYWHERE)] {
        note(
            operation,
            time_each(MOVES, || {
                for _ in 0..MOVES {
                    let key = keys[numbers.below(entries)];
                    queue.reset_at(&key, at(within(&mut numbers, range)));
                }
            }),
        );
    }
    sleep(at(END).saturating_duration_since(Instant::now()));
    let mut fired = 0;
    let begin = std::time::Instant::now();
    // Without tokio's cooperative budget, with which it would yield regularly.
    unconstrained(async {
        while poll_fn(|cx| queue.poll_expired(cx)).await.is_some() {
            fired += 1;
        }
    })
    .await;
    note("fire", begin.elapsed().as_nanos() as f64 / entries as f64);
    assert_eq!(fired, entries, "each timer fires once");
}
