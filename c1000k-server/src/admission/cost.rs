//! What a connection costs in memory, learned from how the room shrinks while connections are admitted.
//!
//! Other processes take memory and give it back meanwhile. So only samples close to each other are compared, and only
//! those with enough connections between them; the estimate is the median of the last few comparisons, which one or two
//! of them can't move. A comparison starts anew when another limit binds or when connections have left. It is dropped if
//! memory came back, and so is what connections take that come after others have left: the kernel has kept their memory.

use std::time::{Duration, Instant};

use c1000k_host::check::KERNEL_BYTES_PER_SOCKET;
use c1000k_host::memory::{MemoryBound, MemoryRoom};

/// The estimate before the first comparison: a socket, and the process's own part.
pub(crate) const BYTES_PER_CONNECTION: u64 = KERNEL_BYTES_PER_SOCKET + 64;

/// A lower cost means that the kernel reuses memory it had kept; a higher one that another process has taken some.
const BYTES_MIN: u64 = BYTES_PER_CONNECTION / 4;
const BYTES_MAX: u64 = BYTES_PER_CONNECTION * 8;

/// Fewer admissions don't stand out: a cgroup's use is counted in steps of 64 pages for each processor.
const ADMISSIONS_MIN: u64 = 1_000;

/// Samples further apart are not compared.
const APART_MAX: Duration = Duration::from_secs(2);

/// The median is taken of this number of comparisons.
const COMPARISONS: usize = 5;

#[derive(Debug)]
pub(crate) struct Cost {
    /// The last comparisons, the latest one first.
    seen_bytes: [u64; COMPARISONS],
    /// The sample that the next one is compared with.
    since: Option<Sample>,
    /// The most connections at any sample.
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

    /// Takes in a sample, at which `connections` left `room_bytes` of this room. What peers on the same machine take is
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

    /// What a connection costs.
    pub(crate) fn bytes(&self) -> u64 {
        let mut sorted = self.seen_bytes;
        sorted.sort_unstable();
        sorted[COMPARISONS / 2]
    }

    /// What it may cost by now: the higher of the median and the last comparison, for admissions of several at once.
    pub(crate) fn bytes_at_most(&self) -> u64 {
        self.bytes().max(self.seen_bytes[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u64 = 1 << 30;

    /// Samples one after the other: the connections at each, and what is left.
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

    /// Thousands of connections at `each_bytes`, while others hold `others_bytes` at each sample.
    fn ramp(each_bytes: u64, others_bytes: &[u64]) -> Vec<(u64, u64)> {
        let samples = (0..).map(|sample| 1_000 * sample).zip(others_bytes);
        samples.map(|(count, others)| (count, count * each_bytes + others)).collect()
    }

    #[test]
    fn the_cost_is_what_the_room_shrinks_by() {
        let cost = learned(&ramp(1_500, &[0; 6]));
        assert_eq!((cost.bytes(), cost.bytes_at_most()), (1_500, 1_500));
        assert_eq!(learned(&[]).bytes(), BYTES_PER_CONNECTION);
    }

    #[test]
    fn a_neighbour_that_comes_or_goes_does_not_change_it() {
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
    fn a_cost_that_rises_counts_at_once_for_those_admitted_together() {
        let mut samples = ramp(1_500, &[0; 7]);
        samples.push((7_000, 6_000 * 1_500 + 1_000 * 6_000));
        let cost = learned(&samples);
        assert_eq!((cost.bytes(), cost.bytes_at_most()), (1_500, 6_000));
    }

    #[test]
    fn what_can_be_no_connection_is_not_believed() {
        let free = learned(&ramp(0, &[0; 8]));
        assert_eq!(free.bytes(), BYTES_MIN);
        let huge = learned(&ramp(64 << 10, &[0; 8]));
        assert_eq!(huge.bytes(), BYTES_MAX);
        let back = ramp(0, &[8, 7, 6, 5, 4, 3]);
        assert_eq!(learned(&back).bytes(), BYTES_PER_CONNECTION);
    }

    #[test]
    fn it_begins_anew_where_connections_leave_another_limit_binds_or_time_goes_by() {
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
        assert!(sample(4_000, 9_000, 1, group()), "some have left");
        assert!(sample(6_000, 9_000_000, 9, group()), "long ago");
        assert!(sample(2_000, 9_000_000, 9, group()), "more have left");
        assert!(sample(6_000, 9_000_000, 10, group()), "others have come instead");
        assert!(!sample(8_000, 13_000_000, 11, group()));
    }
}
