//! Slots with generations: the place where connections, listeners and timers live.
//!
//! An entry is a `head`, which is always there, and a `body`, which can be lent out and given back: while a callback
//! runs, the connection's state is out of its slot, so the callback may use every *other* slot through the context.
//!
//! Invariants:
//! - A name matches its slot until the entry is removed, and never again after.
//! - Capacity is reserved once, up front, and never exceeded: no growth ever copies. Untouched pages cost nothing.
//! - When the last entry leaves a slab that had grown large, its pages go back to the system.

use std::collections::TryReserveError;
use std::mem;

use crate::token::{GENERATION_MAX, Name};

/// A slab that has touched more entries than this gives its memory back when it becomes empty.
const KEEP_ENTRIES_MAX: usize = 4096;

const NO_SLOT: u32 = u32::MAX;

#[derive(Debug)]
pub(crate) struct Slab<H, B> {
    slots: Vec<Slot<H, B>>,
    capacity: usize,
    len: usize,
    /// The slot freed last, which is the one most likely to be in the cache, is used first.
    free_first: u32,
    /// Generation of a slot that is used for the first time.
    generation_floor: u32,
    generation_highest: u32,
}

/// One enum with all fields inline, so that the tag shares its eight bytes with the generation.
#[derive(Debug)]
enum Slot<H, B> {
    Vacant { generation: u32, next: u32 },
    Lent { generation: u32, head: H },
    Full { generation: u32, head: H, body: B },
}

/// The bytes of one slot.
pub(crate) const fn slot_bytes<H, B>() -> usize {
    size_of::<Slot<H, B>>()
}

impl<H, B> Slab<H, B> {
    /// Reserves address space for `capacity` entries.
    pub(crate) fn with_capacity(capacity: usize) -> Result<Self, TryReserveError> {
        let capacity = capacity.min(NO_SLOT as usize);
        Ok(Self {
            slots: reserved(capacity)?,
            capacity,
            len: 0,
            free_first: NO_SLOT,
            generation_floor: 1,
            generation_highest: 1,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len == self.capacity
    }

    /// Puts an entry into a free slot; gives it back when there is none.
    pub(crate) fn insert(&mut self, head: H, body: B) -> Result<Name, (H, B)> {
        if self.is_full() {
            return Err((head, body));
        }
        self.len += 1;
        if self.free_first == NO_SLOT {
            let generation = self.generation_floor;
            let index = self.slots.len() as u32;
            self.slots.push(Slot::Full { generation, head, body });
            return Ok(Name::new(index, generation));
        }
        let index = self.free_first;
        let slot = &mut self.slots[index as usize];
        let Slot::Vacant { generation, next } = *slot else {
            unreachable!("the free list leads only to vacant slots")
        };
        self.free_first = next;
        *slot = Slot::Full { generation, head, body };
        Ok(Name::new(index, generation))
    }

    pub(crate) fn head(&self, name: Name) -> Option<&H> {
        match self.slots.get(name.index() as usize)? {
            Slot::Lent { generation, head } | Slot::Full { generation, head, .. }
                if *generation == name.generation() =>
            {
                Some(head)
            }
            _ => None,
        }
    }

    pub(crate) fn head_mut(&mut self, name: Name) -> Option<&mut H> {
        match self.slots.get_mut(name.index() as usize)? {
            Slot::Lent { generation, head } | Slot::Full { generation, head, .. }
                if *generation == name.generation() =>
            {
                Some(head)
            }
            _ => None,
        }
    }

    /// The body, unless the name is stale or the body is lent.
    pub(crate) fn body(&self, name: Name) -> Option<&B> {
        match self.slots.get(name.index() as usize)? {
            Slot::Full { generation, body, .. } if *generation == name.generation() => Some(body),
            _ => None,
        }
    }

    pub(crate) fn body_mut(&mut self, name: Name) -> Option<&mut B> {
        match self.slots.get_mut(name.index() as usize)? {
            Slot::Full { generation, body, .. } if *generation == name.generation() => Some(body),
            _ => None,
        }
    }

    /// Takes the body out of its slot until [`give_back`](Self::give_back).
    pub(crate) fn lend(&mut self, name: Name) -> Option<B> {
        let slot = self.slots.get_mut(name.index() as usize)?;
        match mem::replace(slot, Slot::Vacant { generation: 0, next: NO_SLOT }) {
            Slot::Full { generation, head, body } if generation == name.generation() => {
                *slot = Slot::Lent { generation, head };
                Some(body)
            }
            other => {
                *slot = other;
                None
            }
        }
    }

    /// Puts a lent body back. A slot can't be removed while its body is lent, so the slot is there.
    pub(crate) fn give_back(&mut self, name: Name, body: B) {
        let slot = &mut self.slots[name.index() as usize];
        match mem::replace(slot, Slot::Vacant { generation: 0, next: NO_SLOT }) {
            Slot::Lent { generation, head } if generation == name.generation() => {
                *slot = Slot::Full { generation, head, body };
            }
            _ => unreachable!("{name:?} was not lent"),
        }
    }

    /// Takes an entry out; its name is stale from now on. `None` for a stale name, and while the body is lent.
    pub(crate) fn remove(&mut self, name: Name) -> Option<(H, B)> {
        let slot = self.slots.get_mut(name.index() as usize)?;
        let vacant =
            Slot::Vacant { generation: generation_after(name.generation()), next: self.free_first };
        match mem::replace(slot, vacant) {
            Slot::Full { generation, head, body } if generation == name.generation() => {
                self.free_first = name.index();
                self.len -= 1;
                self.generation_highest = self.generation_highest.max(generation);
                self.release_when_empty();
                Some((head, body))
            }
            other => {
                *slot = other;
                None
            }
        }
    }

    /// The names of the entries in slots `from` to `to`, in their order.
    pub(crate) fn names(&self, from: usize, to: usize) -> impl Iterator<Item = Name> + '_ {
        let to = to.min(self.slots.len());
        let from = from.min(to);
        self.slots[from..to].iter().zip(from as u32..).filter_map(|(slot, index)| match slot {
            Slot::Vacant { .. } => None,
            Slot::Lent { generation, .. } | Slot::Full { generation, .. } => {
                Some(Name::new(index, *generation))
            }
        })
    }

    /// One past the highest slot ever used since the slab was last empty.
    pub(crate) fn slots_used(&self) -> usize {
        self.slots.len()
    }

    /// Memory that was touched goes back when nothing is left; the generations go on, so old names stay stale.
    fn release_when_empty(&mut self) {
        if self.len > 0 || self.slots.len() <= KEEP_ENTRIES_MAX {
            return;
        }
        if let Ok(fresh) = reserved(self.capacity) {
            self.slots = fresh;
            self.free_first = NO_SLOT;
            self.generation_floor = generation_after(self.generation_highest);
            self.generation_highest = self.generation_floor;
        }
    }
}

fn reserved<T>(capacity: usize) -> Result<Vec<T>, TryReserveError> {
    let mut entries = Vec::new();
    entries.try_reserve_exact(capacity)?;
    Ok(entries)
}

fn generation_after(generation: u32) -> u32 {
    if generation == GENERATION_MAX { 1 } else { generation + 1 }
}
