//! Estimates the memory of a connection from how the room shrinks while connections are admitted.
//!
//! Other processes allocate and free memory at the same time. So only samples close to each other and with enough
//! admissions between them are compared, and the estimate is the median of the last few comparisons, which one or two
//! outliers do not change. A comparison starts again when another limit binds or when connections have closed. It is
//! dropped if the room has grown, and if connections have replaced others, because the kernel reuses the memory of
//! closed ones.

use std::time::{Duration, Instant};

use c1000k_host::check::KERNEL_BYTES_PER_SOCKET;
use c1000k_host::memory::{MemoryBound, MemoryRoom};

/// The estimate before the first comparison: a socket, and the process's part.
pub(crate) const BYTES_PER_CONNECTION: u64 = KERNEL_BYTES_PER_SOCKET + 64;

/// A lower cost means that the kernel reuses memory; a higher one that another process has allocated some.
const BYTES_MIN: u64 = BYTES_PER_CONNECTION / 4;
const BYTES_MAX: u64 = BYTES_PER_CONNECTION * 8;

/// Fewer admissions can't be measured: a cgroup's use is counted in steps of 64 pages per processor.
const ADMISSIONS_MIN: u64 = 1_000;

/// Samples further apart are not compared.
const APART_MAX: Duration = Duration::from_secs(2);

/// The number of comparisons in the median.
const COMPARISONS: usize = 5;

#[derive(Debug)]
pub(crate) struct Cost {
    /// The last comparisons, the latest first.
    seen_bytes: [u64; COMPARISONS],
    /// The sample that the next one is compared with.
    since: Option<Sample>,
    /// The maximum number of connections at any sample.
    most: u64,
}

#[derive(Debug)]
struct Sample {
    at: Instant,
    bound_by: MemoryBound,
    room_bytes: u64,
    connections: u64,
}

impl Cost {
    pub(crate) fn new() -> Self {
        Self { seen_bytes: [BYTES_PER_CONNECTION; COMPARISONS], since: None, most: 0 }
    }

    /// Adds a sample, at which `connections` left `room_bytes` of this room. The memory of peers on the same machine is
    /// part of a connection's cost.
    pub(crate) fn note(
        &mut self,
        room: &MemoryRoom,
        room_bytes: u64,
        connections: u64,
        now: Instant,
    ) {
        let since = self.since.as_ref().filter(|since| {
            since.bound_by == room.bound_by
                && (self.most..=connections).contains(&since.connections)
                && now.saturating_duration_since(since.at) <= APART_MAX
        });
        if let Some(since) = since {
            let added = connections - since.connections;
            if added < ADMISSIONS_MIN {
                return;
            }
            if let Some(taken_bytes) = since.room_bytes.checked_sub(room_bytes) {
                self.note_each(taken_bytes / added);
            }
        }
        self.most = self.most.max(connections);
        let bound_by = room.bound_by.clone();
        self.since = Some(Sample { at: now, bound_by, room_bytes, connections });
    }

    fn note_each(&mut self, bytes: u64) {
        self.seen_bytes.rotate_right(1);
        self.seen_bytes[0] = bytes.clamp(BYTES_MIN, BYTES_MAX);
    }

    /// The cost of a connection.
    pub(crate) fn bytes(&self) -> u64 {
        let mut sorted = self.seen_bytes;
        sorted.sort_unstable();
        sorted[COMPARISONS / 2]
    }

    /// The possible cost: the higher of the median and the last comparison, for admitting several at once.
    pub(crate) fn bytes_at_most(&self) -> u64 {
        self.bytes().max(self.seen_bytes[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u64 = 1 << 30;

    /// Successive samples: the connections and the room at each.
    fn learned(samples: &[(u64, u64)]) -> Cost {
        let started = Instant::now();
        let mut cost = Cost::new();
        for (index, &(connections, taken_bytes)) in samples.iter().enumerate() {
            let now = started + Duration::from_millis(100 * index as u64);
            cost.note(&machine(), ROOM - taken_bytes, connections, now);
        }
        cost
    }

    fn machine() -> MemoryRoom {
        MemoryRoom {
            bytes: ROOM,
            total_bytes: ROOM,
            bound_by: MemoryBound::Machine,
            socket_data_bytes: None,
        }
    }

    /// Thousands of connections of `each_bytes`, while other processes hold `others_bytes` at each sample.
    fn ramp(each_bytes: u64, others_bytes: &[u64]) -> Vec<(u64, u64)> {
        let samples = (0..).map(|sample| 1_000 * sample).zip(others_bytes);
        samples.map(|(count, others)| (count, count * each_bytes + others)).collect()
    }

    #[test]
    fn the_cost_is_how_much_the_room_shrinks() {
        let cost = learned(&ramp(1_500, &[0; 6]));
        assert_eq!((cost.bytes(), cost.bytes_at_most()), (1_500, 1_500));
        assert_eq!(learned(&[]).bytes(), BYTES_PER_CONNECTION);
    }

    #[test]
    fn another_process_that_allocates_or_frees_does_not_change_it() {
        const NEIGHBOUR: u64 = 22 << 20;
        let comes = [0, 0, 0, NEIGHBOUR, NEIGHBOUR, NEIGHBOUR, NEIGHBOUR];
        assert_eq!(learned(&ramp(1_500, &comes)).bytes(), 1_500);
        let comes_last = [0, 0, 0, 0, 0, 0, NEIGHBOUR];
        assert_eq!(learned(&ramp(1_500, &comes_last)).bytes(), 1_500);
        let goes = [NEIGHBOUR, NEIGHBOUR, NEIGHBOUR, 0, 0, 0, 0];
        assert_eq!(learned(&ramp(1_500, &goes)).bytes(), 1_500);
        let in_steps: Vec<u64> = (0..8).map(|sample| sample / 2 * (10 << 20)).collect();
        assert_eq!(learned(&ramp(1_500, &in_steps)).bytes(), 1_500);
    }

    #[test]
    fn a_rising_cost_applies_at_once_to_admissions_together() {
        let mut samples = ramp(1_500, &[0; 7]);
        samples.push((7_000, 6_000 * 1_500 + 1_000 * 6_000));
        let cost = learned(&samples);
        assert_eq!((cost.bytes(), cost.bytes_at_most()), (1_500, 6_000));
    }

    #[test]
    fn an_implausible_cost_is_ignored() {
        let free = learned(&ramp(0, &[0; 8]));
        assert_eq!(free.bytes(), BYTES_MIN);
        let huge = learned(&ramp(64 << 10, &[0; 8]));
        assert_eq!(huge.bytes(), BYTES_MAX);
        let back = ramp(0, &[8, 7, 6, 5, 4, 3]);
        assert_eq!(learned(&back).bytes(), BYTES_PER_CONNECTION);
    }

    #[test]
    fn it_starts_again_when_connections_close_another_limit_binds_or_time_passes() {
        let mut cost = Cost::new();
        let started = Instant::now();
        let mut sample = |connections, taken_bytes, seconds, bound_by| {
            let room = MemoryRoom { bound_by, ..machine() };
            let now = started + Duration::from_secs(seconds);
            cost.note(&room, ROOM - taken_bytes, connections, now);
            cost.seen_bytes == [BYTES_PER_CONNECTION; COMPARISONS]
        };
        let group = || MemoryBound::Cgroup("/group".into());
        assert!(sample(0, 0, 0, MemoryBound::Machine));
        assert!(sample(5_000, 9_000, 1, group()), "another limit");
        assert!(sample(4_000, 9_000, 1, group()), "some have closed");
        assert!(sample(6_000, 9_000_000, 9, group()), "long ago");
        assert!(sample(2_000, 9_000_000, 9, group()), "more have closed");
        assert!(sample(6_000, 9_000_000, 10, group()), "others have replaced them");
        assert!(!sample(8_000, 13_000_000, 11, group()));
    }
}
