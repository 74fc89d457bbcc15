//! What a connection costs, as the room for more shrinks while connections are admitted.
//!
//! Other processes take memory and give it back meanwhile. So only looks close to each other are compared, and only
//! where enough connections came between them to stand out; what is believed is the median of the last few
//! comparisons, which one or two of them can't move. A comparison begins anew where the ground has moved: another
//! limit binds, or connections have left. One by which memory came back says nothing, nor does what those take who come
//! after others have left: the kernel has kept it for them.

use std::time::{Duration, Instant};

use c1000k_host::check::KERNEL_BYTES_PER_SOCKET;
use c1000k_host::memory::{MemoryBound, MemoryRoom};

/// What a connection is taken to cost before anything was seen: its socket, and the process's own part.
pub(crate) const BYTES_PER_CONNECTION: u64 = KERNEL_BYTES_PER_SOCKET + 64;

/// What is less is a kernel that hands out again what it had kept; what is more is another process, for the most part.
const BYTES_MIN: u64 = BYTES_PER_CONNECTION / 4;
const BYTES_MAX: u64 = BYTES_PER_CONNECTION * 8;

/// Fewer admissions don't stand out: a cgroup's use is counted in steps of 64 pages for each processor.
const ADMISSIONS_MIN: u64 = 1_000;

/// Looks further apart are not compared.
const APART_MAX: Duration = Duration::from_secs(2);

/// The median is taken of this number of comparisons.
const COMPARISONS: usize = 5;

#[derive(Debug)]
pub(crate) struct Cost {
    /// The last comparisons, the latest one first.
    seen_bytes: [u64; COMPARISONS],
    /// The look that the next one is compared with.
    since: Option<Look>,
    /// The most connections at any look.
    most: u64,
}

#[derive(Debug)]
struct Look {
    at: Instant,
    bound_by: MemoryBound,
    room_bytes: u64,
    connections: u64,
}

impl Cost {
    pub(crate) fn new() -> Self {
        Self { seen_bytes: [BYTES_PER_CONNECTION; COMPARISONS], since: None, most: 0 }
    }

    /// Takes in a look, at which `connections` left `room_bytes` of this room; peers on the same machine are part of what
    /// a connection costs.
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
        self.since = Some(Look { at: now, bound_by, room_bytes, connections });
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

    /// What it may have come to cost: who admits several at once goes by the dearer of what is believed and what was
    /// seen last.
    pub(crate) fn bytes_at_most(&self) -> u64 {
        self.bytes().max(self.seen_bytes[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u64 = 1 << 30;

    /// Looks one after the other: the connections by then, and what is left.
    fn learned(looks: &[(u64, u64)]) -> Cost {
        let started = Instant::now();
        let mut cost = Cost::new();
        for (index, &(connections, taken_bytes)) in looks.iter().enumerate() {
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

    /// Thousands of connections at `each_bytes`, while others hold `others_bytes` at each look.
    fn ramp(each_bytes: u64, others_bytes: &[u64]) -> Vec<(u64, u64)> {
        let looks = (0..).map(|look| 1_000 * look).zip(others_bytes);
        looks.map(|(count, others)| (count, count * each_bytes + others)).collect()
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
        let goes = [NEIGHBOUR, NEIGHBOUR, NEIGHBOUR, 0, 0, 0, 0];
        assert_eq!(learned(&ramp(1_500, &goes)).bytes(), 1_500);
        let in_steps: Vec<u64> = (0..8).map(|look| look / 2 * (10 << 20)).collect();
        assert_eq!(learned(&ramp(1_500, &in_steps)).bytes(), 1_500);
    }

    #[test]
    fn a_cost_that_rises_counts_at_once_for_those_admitted_together() {
        let mut looks = ramp(1_500, &[0; 7]);
        looks.push((7_000, 6_000 * 1_500 + 1_000 * 6_000));
        let cost = learned(&looks);
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
        let mut look = |connections, taken_bytes, seconds, bound_by| {
            let room = MemoryRoom { bound_by, ..machine() };
            let now = started + Duration::from_secs(seconds);
            cost.note(&room, ROOM - taken_bytes, connections, now);
            cost.seen_bytes == [BYTES_PER_CONNECTION; COMPARISONS]
        };
        let group = || MemoryBound::Cgroup("/group".into());
        assert!(look(0, 0, 0, MemoryBound::Machine));
        assert!(look(5_000, 9_000, 1, group()), "another limit");
        assert!(look(4_000, 9_000, 1, group()), "some have left");
        assert!(look(6_000, 9_000_000, 9, group()), "long ago");
        assert!(look(2_000, 9_000_000, 9, group()), "more have left");
        assert!(look(6_000, 9_000_000, 10, group()), "others have come instead");
        assert!(!look(8_000, 13_000_000, 11, group()));
    }
}
