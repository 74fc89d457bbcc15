//! A slab with generations, which stores connections, listeners and timers.
//!
//! An entry has a `head`, which stays in its slot, and a `body`, which can be lent and given back: while a callback
//! runs, the connection's state is out of its slot, so that the callback can use every *other* slot through the context.
//!
//! Invariants:
//! - A key matches its slot until the entry is removed, and not again before the slot has been used 2^29 times.
//! - The capacity is reserved once and never exceeded, so growth never copies. Untouched pages take no memory.
//! - When the last entry of a slab that had grown large is removed, its pages are returned to the system, unless the
//!   generations of a slot have wrapped around: then no generation is higher than those of all recent keys.

use std::collections::TryReserveError;
use std::mem;

use crate::token::{GENERATION_MAX, SlotKey};

/// A slab that has used more slots than this returns its memory when it becomes empty.
const KEEP_ENTRIES_MAX: usize = 4096;

const NO_SLOT: u32 = u32::MAX;

#[derive(Debug)]
pub(crate) struct Slab<H, B> {
    slots: Vec<Slot<H, B>>,
    capacity: usize,
    len: usize,
    /// The head of the free list. The slot freed last is reused first, because it is most likely in the cache.
    free_first: u32,
    /// The generation of a slot that is used for the first time.
    generation_floor: u32,
    generation_highest: u32,
}

/// All fields are inline in one enum, so that the tag and the generation share eight bytes.
#[derive(Debug)]
enum Slot<H, B> {
    Vacant { generation: u32, next: u32 },
    Lent { generation: u32, head: H },
    Full { generation: u32, head: H, body: B },
}

/// The size of a slot.
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

    /// Puts an entry into a free slot; returns it as an error if the slab is full.
    pub(crate) fn insert(&mut self, head: H, body: B) -> Result<SlotKey, (H, B)> {
        let Some(vacancy) = self.vacancy() else { return Err((head, body)) };
        let (key, generation) = (vacancy.key, vacancy.key.generation());
        vacancy.fill(Slot::Full { generation, head, body });
        Ok(key)
    }

    /// The slot of the next entry; `None` if the slab is full.
    #[inline]
    pub(crate) fn vacancy(&mut self) -> Option<Vacancy<'_, H, B>> {
        if self.is_full() {
            return None;
        }
        let key = match self.slots.get(self.free_first as usize) {
            Some(Slot::Vacant { generation, .. }) => SlotKey::new(self.free_first, *generation),
            _ => SlotKey::new(self.slots.len() as u32, self.generation_floor),
        };
        Some(Vacancy { slab: self, key })
    }

    pub(crate) fn head(&self, key: SlotKey) -> Option<&H> {
        match self.slots.get(key.index() as usize)? {
            Slot::Lent { generation, head } | Slot::Full { generation, head, .. }
                if *generation == key.generation() =>
            {
                Some(head)
            }
            _ => None,
        }
    }

    pub(crate) fn head_mut(&mut self, key: SlotKey) -> Option<&mut H> {
        match self.slots.get_mut(key.index() as usize)? {
            Slot::Lent { generation, head } | Slot::Full { generation, head, .. }
                if *generation == key.generation() =>
            {
                Some(head)
            }
            _ => None,
        }
    }

    /// The body; `None` if the key is stale or the body is lent.
    pub(crate) fn body(&self, key: SlotKey) -> Option<&B> {
        match self.slots.get(key.index() as usize)? {
            Slot::Full { generation, body, .. } if *generation == key.generation() => Some(body),
            _ => None,
        }
    }

    pub(crate) fn body_mut(&mut self, key: SlotKey) -> Option<&mut B> {
        match self.slots.get_mut(key.index() as usize)? {
            Slot::Full { generation, body, .. } if *generation == key.generation() => Some(body),
            _ => None,
        }
    }

    /// Takes the body out of its slot until [`give_back`](Self::give_back); returns it with the head.
    #[inline]
    pub(crate) fn lend(&mut self, key: SlotKey) -> Option<(&mut H, B)> {
        let slot = self.slots.get_mut(key.index() as usize)?;
        // Matched before the move, so that the compiler need not copy the head out and back.
        if !matches!(slot, Slot::Full { generation, .. } if *generation == key.generation()) {
            return None;
        }
        let vacant = Slot::Vacant { generation: 0, next: NO_SLOT };
        let Slot::Full { generation, head, body } = mem::replace(slot, vacant) else {
            return None;
        };
        *slot = Slot::Lent { generation, head };
        match slot {
            Slot::Lent { head, .. } => Some((head, body)),
            _ => None,
        }
    }

    /// Puts a lent body back. An entry can't be removed while its body is lent, so the key still matches the slot.
    ///
    /// # Panics
    /// If the body was not lent.
    #[inline]
    pub(crate) fn give_back(&mut self, key: SlotKey, body: B) {
        let slot = &mut self.slots[key.index() as usize];
        assert!(matches!(slot, Slot::Lent { .. }), "the body was not lent");
        if let Slot::Lent { generation, head } =
            mem::replace(slot, Slot::Vacant { generation: 0, next: NO_SLOT })
        {
            *slot = Slot::Full { generation, head, body };
        }
    }

    /// Removes an entry; its key becomes stale. `None` if the key is stale or the body is lent.
    pub(crate) fn remove(&mut self, key: SlotKey) -> Option<(H, B)> {
        let slot = self.slots.get_mut(key.index() as usize)?;
        let vacant =
            Slot::Vacant { generation: generation_after(key.generation()), next: self.free_first };
        match mem::replace(slot, vacant) {
            Slot::Full { generation, head, body } if generation == key.generation() => {
                self.free_first = key.index();
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

    /// The keys of the entries in the slots `from..to`, in order.
    pub(crate) fn keys(&self, from: usize, to: usize) -> impl Iterator<Item = SlotKey> + '_ {
        let to = to.min(self.slots.len());
        let from = from.min(to);
        self.slots[from..to].iter().zip(from as u32..).filter_map(|(slot, index)| match slot {
            Slot::Vacant { .. } => None,
            Slot::Lent { generation, .. } | Slot::Full { generation, .. } => {
                Some(SlotKey::new(index, *generation))
            }
        })
    }

    /// One past the highest slot that has been used since the memory was last returned.
    pub(crate) fn slots_used(&self) -> usize {
        self.slots.len()
    }

    /// Returns the memory when the slab is empty. The generations continue, so old keys stay stale.
    fn release_when_empty(&mut self) {
        let begun_again = self.generation_highest == GENERATION_MAX;
        if self.len > 0 || self.slots.len() <= KEEP_ENTRIES_MAX || begun_again {
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

/// A free slot, to be filled.
pub(crate) struct Vacancy<'a, H, B> {
    slab: &'a mut Slab<H, B>,
    key: SlotKey,
}

impl<H, B> Vacancy<'_, H, B> {
    /// The key of the future entry.
    pub(crate) fn key(&self) -> SlotKey {
        self.key
    }

    /// Inserts an entry whose body is lent at first; [`Slab::give_back`] completes it.
    #[inline]
    pub(crate) fn insert_lent(self, head: H) {
        let generation = self.key.generation();
        self.fill(Slot::Lent { generation, head });
    }

    #[inline]
    fn fill(self, entry: Slot<H, B>) {
        let Self { slab, key } = self;
        slab.len += 1;
        match slab.slots.get_mut(key.index() as usize) {
            None => slab.slots.push(entry),
            Some(slot) => {
                if let Slot::Vacant { next, .. } = mem::replace(slot, entry) {
                    slab.free_first = next;
                }
            }
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// Fewer under Miri, which is a thousand times slower.
    const STEPS_MAX: usize = if cfg!(miri) { 30 } else { 300 };

    /// Small, so that slots are reused often.
    const CAPACITY: usize = 12;

    #[derive(Clone, Debug)]
    enum Step {
        Insert,
        Remove(usize),
        RemoveStale(usize),
        Lend(usize),
        GiveBack(usize),
        Change(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Insert),
            3 => any::<usize>().prop_map(Step::Remove),
            1 => any::<usize>().prop_map(Step::RemoveStale),
            2 => any::<usize>().prop_map(Step::Lend),
            2 => any::<usize>().prop_map(Step::GiveBack),
            1 => any::<usize>().prop_map(Step::Change),
        ]
    }

    /// A slab, a map with the same entries as its model, and all stale keys.
    struct Pair {
        slab: Slab<u64, String>,
        model: HashMap<SlotKey, (u64, String)>,
        keys: Vec<SlotKey>,
        lent: HashMap<SlotKey, String>,
        stale: Vec<SlotKey>,
        inserted: u64,
    }

    impl Pair {
        fn new(capacity: usize) -> Self {
            Self {
                slab: Slab::with_capacity(capacity).unwrap(),
                model: HashMap::new(),
                keys: Vec::new(),
                lent: HashMap::new(),
                stale: Vec::new(),
                inserted: 0,
            }
        }

        fn take(&mut self, step: Step) {
            let pick = |keys: &[SlotKey], number: usize| {
                (!keys.is_empty()).then(|| keys[number % keys.len()])
            };
            match step {
                Step::Insert => self.insert(),
                Step::Remove(number) => {
                    if let Some(key) = pick(&self.keys, number) {
                        self.remove(key);
                    }
                }
                Step::RemoveStale(number) => {
                    if let Some(key) = pick(&self.stale, number) {
                        assert_eq!(self.slab.remove(key), None);
                    }
                }
                Step::Lend(number) => {
                    if let Some(key) = pick(&self.keys, number) {
                        self.lend(key);
                    }
                }
                Step::GiveBack(number) => {
                    let mut lent: Vec<_> = self.lent.keys().copied().collect();
                    lent.sort();
                    if let Some(key) = pick(&lent, number) {
                        self.slab.give_back(key, self.lent.remove(&key).unwrap());
                    }
                }
                Step::Change(number) => {
                    if let Some(key) = pick(&self.keys, number) {
                        *self.slab.head_mut(key).unwrap() += 1;
                        self.model.get_mut(&key).unwrap().0 += 1;
                    }
                }
            }
        }

        fn insert(&mut self) {
            let entry = (self.inserted, self.inserted.to_string());
            match self.slab.insert(entry.0, entry.1.clone()) {
                Ok(key) => {
                    self.inserted += 1;
                    assert_eq!(self.model.insert(key, entry), None, "{key:?} is in use");
                    assert!(!self.stale.contains(&key), "{key:?} was used before");
                    self.keys.push(key);
                }
                Err(back) => {
                    assert_eq!(back, entry);
                    assert_eq!(self.model.len(), self.slab.capacity());
                }
            }
        }

        fn remove(&mut self, key: SlotKey) {
            let removed = self.slab.remove(key);
            if self.lent.contains_key(&key) {
                assert_eq!(removed, None, "an entry was removed while its body was lent");
                return;
            }
            assert_eq!(removed, self.model.remove(&key));
            self.keys.retain(|&other| other != key);
            self.stale.push(key);
        }

        fn lend(&mut self, key: SlotKey) {
            let lent = self.slab.lend(key);
            if self.lent.contains_key(&key) {
                assert_eq!(lent, None, "a body was lent twice");
                return;
            }
            let (head, body) = lent.unwrap();
            assert_eq!((&*head, &body), (&self.model[&key].0, &self.model[&key].1));
            self.lent.insert(key, body);
        }

        fn compare(&mut self) {
            assert_eq!(self.slab.len(), self.model.len());
            assert_eq!(self.slab.is_full(), self.model.len() == self.slab.capacity());
            for (&key, (head, body)) in &mut self.model {
                assert_eq!(self.slab.head(key), Some(&*head));
                assert_eq!(self.slab.head_mut(key), Some(head));
                let body = (!self.lent.contains_key(&key)).then_some(body);
                assert_eq!(self.slab.body(key), body.as_deref());
                assert_eq!(self.slab.body_mut(key), body);
            }
            for &key in &self.stale {
                assert_eq!(self.slab.head(key), None);
                assert_eq!(self.slab.head_mut(key), None);
                assert_eq!(self.slab.body(key), None);
                assert_eq!(self.slab.body_mut(key), None);
                assert_eq!(self.slab.lend(key), None);
            }
            let mut keys: Vec<_> = self.model.keys().copied().collect();
            keys.sort_by_key(|key| key.index());
            let listed: Vec<_> = self.slab.keys(0, self.slab.slots_used()).collect();
            assert_eq!(listed, keys);
        }
    }

    proptest! {
        #[test]
        fn it_behaves_like_a_map(steps in prop::collection::vec(step(), 1..STEPS_MAX)) {
            let mut pair = Pair::new(CAPACITY);
            for step in steps {
                pair.take(step);
                pair.compare();
            }
        }
    }

    /// A simple generator: the test needs many numbers, not good ones.
    fn numbers(mut seed: u64) -> impl FnMut(usize) -> usize {
        move |below| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % below as u64) as usize
        }
    }

    #[test]
    fn a_million_entries_keep_their_keys_through_churn() {
        const ENTRIES: usize = 1_000_000;
        let mut slab = Slab::with_capacity(ENTRIES).unwrap();
        let mut number = numbers(42);
        let mut model: Vec<(SlotKey, u64)> =
            (0..ENTRIES as u64).map(|id| (slab.insert(id, !id).unwrap(), id)).collect();
        assert!(slab.insert(0, 0).is_err());
        for id in ENTRIES as u64..ENTRIES as u64 + 500_000 {
            let place = number(ENTRIES);
            let (old, old_id) = model[place];
            assert_eq!(slab.remove(old), Some((old_id, !old_id)));
            let new = slab.insert(id, !id).unwrap();
            assert_eq!(slab.head(old), None);
            model[place] = (new, id);
        }
        for &(key, id) in &model {
            assert_eq!(slab.head(key), Some(&id));
            assert_eq!(slab.body(key), Some(&!id));
        }
        assert_eq!(slab.slots_used(), ENTRIES);
        for (key, id) in model {
            assert_eq!(slab.remove(key), Some((id, !id)));
        }
        assert_eq!((slab.len(), slab.slots_used()), (0, 0));
    }

    #[test]
    fn keys_from_before_a_release_stay_stale_after_it() {
        let mut slab = Slab::with_capacity(KEEP_ENTRIES_MAX * 2).unwrap();
        let mut stale = Vec::new();
        for _ in 0..3 {
            let keys: Vec<_> =
                (0..=KEEP_ENTRIES_MAX).map(|_| slab.insert((), ()).unwrap()).collect();
            for &key in &stale {
                assert_eq!(slab.head(key), None);
                assert_eq!(slab.remove(key), None);
            }
            assert_eq!(slab.len(), keys.len());
            // One slot is reused, so that its generation is higher than all others.
            let last = *keys.last().unwrap();
            assert!(slab.remove(last).is_some());
            let again = slab.insert((), ()).unwrap();
            assert_ne!(last, again);
            for &key in keys[..KEEP_ENTRIES_MAX].iter().chain([&again]) {
                assert!(slab.remove(key).is_some());
            }
            assert_eq!(slab.slots_used(), 0, "the memory was not returned");
            stale.extend(keys);
            stale.push(again);
        }
    }

    #[test]
    fn a_small_slab_keeps_its_memory_when_it_becomes_empty() {
        let mut slab = Slab::with_capacity(KEEP_ENTRIES_MAX).unwrap();
        let keys: Vec<_> = (0..KEEP_ENTRIES_MAX).map(|_| slab.insert((), ()).unwrap()).collect();
        for key in keys {
            assert!(slab.remove(key).is_some());
        }
        assert_eq!(slab.slots_used(), KEEP_ENTRIES_MAX);
    }

    #[test]
    fn generations_start_again_after_the_last_one() {
        let mut slab = Slab::with_capacity(1).unwrap();
        slab.generation_floor = GENERATION_MAX - 1;
        let before_last = slab.insert(1, ()).unwrap();
        slab.remove(before_last).unwrap();
        let last = slab.insert(2, ()).unwrap();
        assert_eq!(last.generation(), GENERATION_MAX);
        slab.remove(last).unwrap();
        let first = slab.insert(3, ()).unwrap();
        assert_eq!((first.index(), first.generation()), (0, 1));
        assert_eq!(slab.head(before_last), None);
        assert_eq!(slab.head(last), None);
        assert_eq!(slab.head(first), Some(&3));
    }

    #[test]
    fn memory_is_kept_after_generations_have_wrapped_around() {
        let mut slab = Slab::with_capacity(KEEP_ENTRIES_MAX + 1).unwrap();
        slab.generation_floor = GENERATION_MAX;
        let mut recent = Vec::new();
        for generation in [GENERATION_MAX, 1, 2] {
            let keys: Vec<_> =
                (0..=KEEP_ENTRIES_MAX).map(|_| slab.insert((), ()).unwrap()).collect();
            assert!(keys.iter().all(|key| key.generation() == generation));
            for &key in &keys {
                assert!(slab.remove(key).is_some());
            }
            recent.extend(keys);
        }
        assert_eq!(slab.slots_used(), KEEP_ENTRIES_MAX + 1);
        assert!(recent.iter().all(|&key| slab.head(key).is_none()));
    }

    #[test]
    fn an_unused_index_matches_nothing() {
        let mut slab: Slab<u8, u8> = Slab::with_capacity(4).unwrap();
        for index in [0, 3, 4, u32::MAX] {
            let key = SlotKey::new(index, 1);
            assert_eq!(slab.head(key), None);
            assert_eq!(slab.lend(key), None);
            assert_eq!(slab.remove(key), None);
        }
    }

    #[test]
    fn a_slab_without_capacity_accepts_nothing() {
        let mut slab = Slab::with_capacity(0).unwrap();
        assert!(slab.is_full());
        assert_eq!(slab.insert(1, 2), Err((1, 2)));
    }

    #[test]
    fn more_than_the_address_space_is_refused() {
        assert!(Slab::<[u64; 1 << 30], ()>::with_capacity(usize::MAX).is_err());
    }
}
