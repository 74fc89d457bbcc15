//! Bytes per entry, measured as resident pages.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hint::black_box;
use std::io;
use std::net::TcpStream;
use std::time::Duration;

use tokio_util::time::DelayQueue;

use crate::anonymous_bytes;
use crate::slab::Slab;
use crate::wheel::Wheel;

/// The size of the reactor's own state of a connection.
type Link = [u32; 4];

/// The size of a stream, without a million descriptors; `Option` has the same niche.
type Stream = std::num::NonZeroI32;
const _: () = assert!(size_of::<Option<Stream>>() == size_of::<Option<TcpStream>>());

pub(super) fn run(
    entries: usize,
    note: &mut dyn FnMut(&'static str, &'static str, f64),
) -> io::Result<()> {
    let mut note = |structure, operation, bytes: u64| {
        note(structure, operation, bytes as f64 / entries as f64);
    };
    note("reactor's slab", "connection", own_slab(entries)?);
    note("slab crate of mio streams", "connection", slab_crate(entries)?);
    note("reactor's wheel", "armed timer", wheel(entries)?);
    note("BinaryHeap and a deadline each", "armed timer", heap(entries)?);
    note("DelayQueue", "armed timer", delay_queue(entries)?);
    Ok(())
}

/// The growth of memory by the result of `fill`.
fn growth<T>(fill: impl FnOnce() -> io::Result<T>) -> io::Result<u64> {
    let before = anonymous_bytes()?;
    let kept = black_box(fill()?);
    let after = anonymous_bytes()?;
    drop(kept);
    Ok(after.saturating_sub(before))
}

fn own_slab(entries: usize) -> io::Result<u64> {
    growth(|| {
        let mut slab = Slab::<Link, ()>::with_capacity(entries).map_err(io::Error::other)?;
        for number in 0..entries as u32 {
            let _ = slab.insert([number; 4], ());
        }
        Ok(slab)
    })
}

fn slab_crate(entries: usize) -> io::Result<u64> {
    growth(|| {
        let mut slab = ::slab::Slab::<Stream>::new();
        for _ in 0..entries {
            slab.insert(Stream::MIN);
        }
        Ok(slab)
    })
}

fn wheel(entries: usize) -> io::Result<u64> {
    growth(|| {
        let mut wheel = Wheel::with_capacity(entries).map_err(io::Error::other)?;
        for key in 0..entries as u64 {
            wheel.insert(60_000 + key % 1000, key);
        }
        Ok(wheel)
    })
}

fn heap(entries: usize) -> io::Result<u64> {
    growth(|| {
        let mut heap = BinaryHeap::new();
        let mut deadlines = Vec::new();
        for id in 0..entries as u32 {
            let deadline = 60_000 + u64::from(id % 1000);
            heap.push(Reverse((deadline, id)));
            deadlines.push(deadline);
        }
        Ok((heap, deadlines))
    })
}

fn delay_queue(entries: usize) -> io::Result<u64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let _inside = runtime.enter();
    growth(|| {
        let mut queue = DelayQueue::new();
        for id in 0..entries as u64 {
            queue.insert(id, Duration::from_millis(60_000 + id % 1000));
        }
        Ok(queue)
    })
}
