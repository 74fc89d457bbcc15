//! The reactor's slab and the `slab` crate, which has no generations: there a stale key finds another entry.

use std::hint::black_box;
use std::io;

use crate::slab::Slab;
use crate::{Numbers, time_each};

/// The size of the reactor's own state of a connection.
type Entry = [u32; 4];

pub(super) fn run(
    entries: usize,
    note: &mut dyn FnMut(&'static str, &'static str, f64),
) -> io::Result<()> {
    own(entries, &mut |operation, ns| note("reactor's slab", operation, ns))?;
    other(entries, &mut |operation, ns| note("slab crate", operation, ns))
}

fn own(entries: usize, note: &mut dyn FnMut(&'static str, f64)) -> io::Result<()> {
    let mut slab = Slab::<Entry, ()>::with_capacity(entries).map_err(io::Error::other)?;
    let mut names = Vec::with_capacity(entries);
    let insert = |slab: &mut Slab<Entry, ()>, number: u32| slab.insert([number; 4], ());
    note(
        "insert",
        time_each(entries, || {
            names.extend((0..entries as u32).filter_map(|number| insert(&mut slab, number).ok()));
        }),
    );
    shuffle(&mut names);
    note(
        "get at random",
        time_each(entries, || {
            for &name in &names {
                black_box(slab.head(name));
            }
        }),
    );
    note(
        "remove and insert at random",
        time_each(entries, || {
            for name in &mut names {
                black_box(slab.remove(*name));
                if let Ok(new) = insert(&mut slab, 7) {
                    *name = new;
                }
            }
        }),
    );
    note(
        "remove at random",
        time_each(entries, || {
            for &name in &names {
                black_box(slab.remove(name));
            }
        }),
    );
    Ok(())
}

fn other(entries: usize, note: &mut dyn FnMut(&'static str, f64)) -> io::Result<()> {
    let mut slab = ::slab::Slab::<Entry>::with_capacity(entries);
    let mut keys = Vec::with_capacity(entries);
    note(
        "insert",
        time_each(entries, || {
            keys.extend((0..entries as u32).map(|number| slab.insert([number; 4])));
        }),
    );
    shuffle(&mut keys);
    note(
        "get at random",
        time_each(entries, || {
            for &key in &keys {
                black_box(slab.get(key));
            }
        }),
    );
    note(
        "remove and insert at random",
        time_each(entries, || {
            for key in &mut keys {
                black_box(slab.try_remove(*key));
                *key = slab.insert([7; 4]);
            }
        }),
    );
    note(
        "remove at random",
        time_each(entries, || {
            for &key in &keys {
                black_box(slab.try_remove(key));
            }
        }),
    );
    Ok(())
}

fn shuffle<T>(items: &mut [T]) {
    let mut numbers = Numbers::new();
    for last in (1..items.len()).rev() {
        items.swap(last, numbers.below(last + 1));
    }
}
