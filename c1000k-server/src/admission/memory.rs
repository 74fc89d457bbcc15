//! The memory guard: it stops admitting before a reserve of memory is used, and continues when there is room again.
//!
//! A sample reads a few small files, so it is not taken for every connection. It allows the number of admissions that
//! fit into half of the room above the reserve, by the measured [`cost`](super::cost) of a connection. When these are
//! used up, or after an interval, memory is sampled again. So admissions do not use the reserve, however fast peers
//! arrive. A thread takes a few admissions at a time, fewer when there is less room; unused ones are void at the next
//! sample.
//!
//! Not all memory of closed connections returns to the machine at once: the kernel keeps it in its slabs for new
//! connections. So the number of connections held when the guard closed may be held again, unless another process has
//! taken the memory.
//!
//! The reserve is for later needs: output queues, which may take half of it, and refused peers, whose sockets the
//! kernel frees a moment after the close. So a sample also limits the refusals until the next one. When more than half
//! of the reserve is used, the connections with the most queued data are reset; so are slow readers while the kernel is
//! short of room for data.

use std::time::{Duration, Instant};

use c1000k_host::format;
use c1000k_host::memory::{MemoryBound, MemoryReader, MemoryRoom, reserve_bytes};
use c1000k_host::quantity::parse_bytes;
use c1000k_host::usage::SocketUsage;
use clap::ValueEnum;

use super::cost::Cost;
use super::decision::{Budget, Change, Decision, Shortage, cgroup_of};

/// Time between two samples.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(250);

/// The same while the reserve is being used.
const SAMPLE_INTERVAL_TIGHT: Duration = Duration::from_millis(25);

/// At least this number is refused between two samples, however little memory is left, so that peers get an answer.
const REFUSALS_MIN: u64 = 16;

/// The maximum number of admissions, or refusals, that one sample allows.
const BUDGET_MAX: u64 = 4_096;

/// With room for fewer than this number the guard closes, because a sample per connection would be too expensive. A
/// thread takes at most this number at once.
const ADMISSIONS_MIN: u64 = 64;

/// The guard stays closed for at least this time, to avoid flapping.
const CLOSED_MIN: Duration = Duration::from_secs(1);

/// If no connection has closed, there must have been room for this time, because memory use fluctuates.
const BACK_MIN: Duration = Duration::from_secs(3);

/// The memory of a connection with data in flight, if it is charged to a cgroup: a page. All may have some at once.
const DATA_BYTES_PER_CONNECTION: u64 = 4_096;

/// The memory to keep free.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Reserve {
    Bytes(u64),
    /// A part of the machine's memory, or of the cgroup's limit.
    Percent(f64),
    /// A tenth, at most 1 GiB.
    Default,
}

/// How peers are treated while there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Overload {
    /// Reset each at once.
    Refuse,
    /// Let them wait: a few in the backlogs, the rest unanswered.
    Pause,
}

/// The values that one sample reads.
#[derive(Clone, Debug, Default)]
struct Reading {
    rooms: Vec<MemoryRoom>,
    /// Data queued in all sockets.
    queued_bytes: u64,
    /// The kernel reports that it is short of room for data.
    buffers_pressed: bool,
}

#[derive(Debug)]
pub(crate) struct MemoryGuard {
    reader: MemoryReader,
    reserve: Reserve,
    threads: u64,
    /// `net.ipv4.tcp_mem` in bytes; only the first network namespace shows it.
    buffer_limits: Option<[u64; 3]>,
    /// Why and since when it is closed.
    closed: Option<(Shortage, Instant)>,
    /// Since when each sample has found room to open again.
    back_since: Option<Instant>,
    /// Connections held when the guard closed.
    proven: u64,
    cost: Cost,
    room_bytes: Option<u64>,
    room_min_bytes: u64,
    reserve_bytes: u64,
    buffers_full: bool,
    charges_socket_data: bool,
    closings: u64,
    closed_before: Duration,
    samples: u64,
}

impl Reserve {
    /// # Errors
    /// A sentence that describes the accepted values.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let Some(number) = text.trim().strip_suffix('%') else {
            return parse_bytes(text).map(Self::Bytes);
        };
        match number.trim().parse::<f64>() {
            Ok(percent) if (0.0..100.0).contains(&percent) => Ok(Self::Percent(percent)),
            _ => Err(format!(
                "{text:?} is not a share of the memory; use 0% to 99%, or a size such as 512M"
            )),
        }
    }

    fn bytes(self, total_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => (total_bytes as f64 * percent / 100.0) as u64,
            Self::Default => reserve_bytes(total_bytes),
        }
    }
}

impl MemoryGuard {
    /// A guard whose admissions `threads` share.
    pub(crate) fn new(reserve: Reserve, threads: u64) -> Self {
        Self {
            reader: MemoryReader::new(),
            reserve,
            threads,
            buffer_limits: SocketUsage::buffer_limits_bytes(),
            closed: None,
            back_since: None,
            proven: 0,
            cost: Cost::new(),
            room_bytes: None,
            room_min_bytes: u64::MAX,
            reserve_bytes: 0,
            buffers_full: false,
            charges_socket_data: true,
            closings: 0,
            closed_before: Duration::ZERO,
            samples: 0,
        }
    }

    /// # Errors
    /// One line, if the reserve is all the memory there is, so that no connection could ever be admitted.
    pub(crate) fn check_reserve(&self) -> Result<(), String> {
        let all = |room: &MemoryRoom| self.reserve.bytes(room.total_bytes) >= room.total_bytes;
        let Some(room) = self.reader.rooms().into_iter().find(all) else { return Ok(()) };
        Err(format!(
            "--memory-reserve is {}, and {}{} is all the memory there is: use less, such as 10%",
            format::bytes(self.reserve.bytes(room.total_bytes)),
            format::bytes(room.total_bytes),
            cgroup_of(&room),
        ))
    }

    /// A line for each limit of memory that can't be read here, and so is not guarded.
    pub(crate) fn blind_spots(&self) -> Vec<String> {
        let machine = self.reader.rooms().is_empty().then(|| {
            "memory: the available memory can't be read here (there is no /proc/meminfo), so --memory-reserve is not kept; \
             bound the server by --max-connections"
                .to_owned()
        });
        let cgroup = self.reader.hidden_cgroup().map(|group| {
            format!(
                "memory: the limits of the cgroup {} can't be read here, so they are not applied; mount its files \
                 where the server runs, or bound the server by --max-connections",
                group.display()
            )
        });
        machine.into_iter().chain(cgroup).collect()
    }

    /// The maximum of all output queues together: half of the reserve, and a quarter of what is free above it; without
    /// a reserve only the second. `None` if memory can't be read.
    pub(crate) fn queues_bytes_max(&self) -> Option<u64> {
        let rooms = self.reader.rooms();
        rooms.iter().map(|room| queues_bytes_within(room, self.reserve)).min()
    }

    /// The decision before the first sample: nothing is short, and the first connection requires a sample.
    pub(crate) fn unsampled(&self) -> Decision {
        self.decision(None, 0, 0)
    }

    /// Takes a sample, with `connections` held.
    pub(crate) fn sample(&mut self, connections: u64, now: Instant) -> Decision {
        let queued_bytes = SocketUsage::read().map_or(0, |usage| usage.buffer_bytes);
        let buffers_pressed = self.buffer_limits.is_none() && SocketUsage::is_pressed();
        let reading = Reading { rooms: self.reader.rooms(), queued_bytes, buffers_pressed };
        self.decide(&reading, connections, now)
    }

    pub(crate) fn record(&self, now: Instant) -> Option<c1000k_record::MemoryGuard> {
        let closed_now = self.closed.as_ref().map(|(_, since)| now.duration_since(*since));
        Some(c1000k_record::MemoryGuard {
            closed: self.closed.is_some(),
            closings: self.closings,
            closed_seconds: (self.closed_before + closed_now.unwrap_or_default()).as_secs_f64(),
            looks: self.samples,
            reserve_bytes: self.reserve_bytes,
            room_bytes: self.room_bytes?,
            room_min_bytes: self.room_min_bytes,
            bytes_per_connection: self.cost.bytes(),
        })
    }

    fn decide(&mut self, reading: &Reading, connections: u64, now: Instant) -> Decision {
        self.samples += 1;
        let above_reserve = |room: &MemoryRoom| {
            let kept_bytes =
                self.reserve.bytes(room.total_bytes).saturating_add(data_bytes(room, connections));
            idle_bytes(room) as i64 - kept_bytes.min(i64::MAX as u64) as i64
        };
        let Some(room) = reading.rooms.iter().min_by_key(|room| above_reserve(room)) else {
            // Memory that can't be read can't be guarded. If it could be read before, it is not assumed to be
            // plentiful.
            let admissions = if self.room_bytes.is_none() { BUDGET_MAX } else { ADMISSIONS_MIN };
            return self.decision(None, admissions, REFUSALS_MIN);
        };
        let spare_bytes = above_reserve(room);
        self.reserve_bytes = self.reserve.bytes(room.total_bytes);
        self.room_bytes = Some(room.bytes);
        self.room_min_bytes = self.room_min_bytes.min(room.bytes);
        self.buffers_full = self.are_buffers_full(reading, room);
        self.charges_socket_data =
            room.bound_by == MemoryBound::Machine || room.socket_data_bytes.is_some();
        self.cost.note(room, idle_bytes(room), connections, now);

        let half_bytes = spare_bytes.max(0) as u64 / 2;
        let fitting = half_bytes / (self.cost.bytes() + data_bytes(room, 1));
        let granted = half_bytes / (self.cost.bytes_at_most() + data_bytes(room, 1));
        let replaced = self.replaceable(spare_bytes, connections);
        let shortage = self.buffers_short(reading).or_else(|| {
            let short = fitting < ADMISSIONS_MIN.max(self.threads) && replaced == 0;
            let shortage =
                || Shortage::Memory { room: room.clone(), reserve_bytes: self.reserve_bytes };
            short.then(shortage)
        });
        let back_bytes = back_bytes(self.reserve_bytes, room.total_bytes);
        let is_back = spare_bytes >= back_bytes as i64;
        self.back_since = is_back.then(|| self.back_since.unwrap_or(now));
        let change = self.note_shortage(shortage, replaced, connections, now);
        self.decision(change, granted.max(replaced).min(BUDGET_MAX), self.refusals_fitting(room))
    }

    /// Closes at a shortage, and opens when it has lastingly ended.
    fn note_shortage(
        &mut self,
        shortage: Option<Shortage>,
        replaced: u64,
        connections: u64,
        now: Instant,
    ) -> Option<Change> {
        match (shortage, &mut self.closed) {
            (Some(shortage), None) => {
                self.closed = Some((shortage, now));
                self.closings += 1;
                self.proven = connections;
                Some(Change::Closed)
            }
            (Some(shortage), Some((known, _))) => {
                *known = shortage;
                None
            }
            (None, Some((_, since))) => {
                let is_steady = |since| now.duration_since(since) >= BACK_MIN;
                let is_enough =
                    self.back_since.is_some_and(is_steady) || replaced >= (self.proven / 20).max(1);
                let closed_for = now.duration_since(*since);
                if !is_enough || closed_for < CLOSED_MIN {
                    return None;
                }
                self.closed_before += closed_for;
                self.closed = None;
                Some(Change::Opened)
            }
            (None, None) => None,
        }
    }

    fn decision(&self, change: Option<Change>, admissions: u64, refusals: u64) -> Decision {
        let shortage = self.closed.as_ref().map(|(shortage, _)| shortage.clone());
        // What was left of the reserve at the last successful sample.
        let left_bytes = self.room_bytes.filter(|_| shortage.is_some()).unwrap_or(u64::MAX);
        let is_tight = left_bytes < self.reserve_bytes / 4 * 3;
        Decision {
            admissions: Budget::new(if shortage.is_some() { 0 } else { admissions }),
            admissions_per_draw: match shortage {
                Some(_) => 0,
                None => (admissions / self.threads).clamp(1, ADMISSIONS_MIN),
            },
            refusals: Budget::new(refusals),
            memory_to_free_bytes: (self.reserve_bytes / 2).saturating_sub(left_bytes),
            buffers_to_free_bytes: shortage.as_ref().map_or(0, |it| self.excess_buffer_bytes(it)),
            buffers_full: self.buffers_full,
            charges_socket_data: self.charges_socket_data,
            sample_interval: if is_tight { SAMPLE_INTERVAL_TIGHT } else { SAMPLE_INTERVAL },
            shortage,
            change,
        }
    }

    /// The number of connections that may replace those closed since the guard closed.
    fn replaceable(&self, spare_bytes: i64, connections: u64) -> u64 {
        let taken_by_others = spare_bytes < -((self.reserve_bytes / 4) as i64);
        if taken_by_others { 0 } else { self.proven.saturating_sub(connections) }
    }

    /// The refusals before the next sample: together they take a sixteenth of the reserve, or less if a part of it is
    /// used.
    fn refusals_fitting(&self, room: &MemoryRoom) -> u64 {
        let left_bytes = room.bytes.saturating_sub(self.reserve_bytes / 2);
        let most_bytes = (left_bytes / 2).min(self.reserve_bytes / 16);
        (most_bytes / self.cost.bytes()).clamp(REFUSALS_MIN, BUDGET_MAX)
    }

    /// Whether half of the amount that puts the kernel under pressure is queued, or half of a reserve that is charged
    /// for it. The kernel's marks are parts of the memory; if they are hidden, a lower part is used.
    fn are_buffers_full(&self, reading: &Reading, room: &MemoryRoom) -> bool {
        let hidden = || reading.rooms.iter().map(|room| room.total_bytes / 32).max();
        let mark = self.buffer_limits.map_or_else(hidden, |[_, pressure, _]| Some(pressure / 2));
        let charged_bytes = room.socket_data_bytes.unwrap_or(0);
        reading.buffers_pressed
            || mark.is_some_and(|mark| reading.queued_bytes > mark)
            || charged_bytes > self.reserve_bytes / 2
    }

    /// At its limit for queued data the kernel drops received data, also of open connections.
    fn buffers_short(&self, reading: &Reading) -> Option<Shortage> {
        let queued_bytes = reading.queued_bytes;
        let Some([_, pressure, limit]) = self.buffer_limits else {
            return reading.buffers_pressed.then_some(Shortage::BufferPressure { queued_bytes });
        };
        let already = matches!(self.closed, Some((Shortage::SocketBuffers { .. }, _)));
        let bound = if already { pressure } else { pressure.midpoint(limit) };
        (queued_bytes > bound)
            .then_some(Shortage::SocketBuffers { queued_bytes, limit_bytes: limit })
    }

    /// Bytes of queued data in the kernel that one thread's slow readers must free: until the total is well below the
    /// mark at which the guard opens; if the marks are hidden, a part of the queued data.
    fn excess_buffer_bytes(&self, shortage: &Shortage) -> u64 {
        let excess_bytes = match (shortage, self.buffer_limits) {
            (Shortage::SocketBuffers { queued_bytes, .. }, Some([_, pressure, _])) => {
                queued_bytes.saturating_sub(pressure / 4 * 3)
            }
            (Shortage::BufferPressure { queued_bytes }, _) => queued_bytes / 4,
            _ => 0,
        };
        excess_bytes.div_ceil(self.threads)
    }
}

impl Decision {
    /// The additional free memory that an admission needs, if memory is short.
    pub(crate) fn lacking_bytes(&self) -> Option<u64> {
        let Some(Shortage::Memory { room, reserve_bytes }) = &self.shortage else { return None };
        let wanted_bytes = reserve_bytes + back_bytes(*reserve_bytes, room.total_bytes);
        Some(wanted_bytes.saturating_sub(room.bytes))
    }
}

/// The room without data in flight.
fn idle_bytes(room: &MemoryRoom) -> u64 {
    room.bytes.saturating_add(room.socket_data_bytes.unwrap_or(0))
}

/// The room that the data of this number of connections may take.
fn data_bytes(room: &MemoryRoom, connections: u64) -> u64 {
    let now_bytes = room.socket_data_bytes;
    now_bytes.map_or(0, |bytes| bytes.max(connections.saturating_mul(DATA_BYTES_PER_CONNECTION)))
}

/// The free memory above the reserve at which the guard opens; it is attainable even if the reserve is nearly all
/// memory.
fn back_bytes(reserve_bytes: u64, total_bytes: u64) -> u64 {
    reserve_bytes.min(total_bytes.saturating_sub(reserve_bytes)) / 4
}

fn queues_bytes_within(room: &MemoryRoom, reserve: Reserve) -> u64 {
    let reserve_bytes = reserve.bytes(room.total_bytes);
    let quarter = room.bytes.saturating_sub(reserve_bytes) / 4;
    if reserve_bytes == 0 { quarter } else { quarter.min(reserve_bytes / 2) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A machine on which each connection takes a number of bytes, and does not return all of them.
    struct Machine {
        total_bytes: u64,
        others_bytes: u64,
        bytes_each: u64,
        held: u64,
        held_max: u64,
        kept_percent: u64,
        data_bytes: Option<u64>,
        /// Admissions drawn and not used.
        drawn: u64,
    }

    impl Machine {
        fn reading(&self) -> Reading {
            let kept = (self.held_max - self.held) * self.kept_percent / 100;
            let used = self.others_bytes
                + (self.held + kept) * self.bytes_each
                + self.data_bytes.unwrap_or(0);
            let bytes = self.total_bytes.saturating_sub(used);
            let room = MemoryRoom {
                bytes,
                total_bytes: self.total_bytes,
                bound_by: MemoryBound::Machine,
                socket_data_bytes: self.data_bytes,
            };
            Reading { rooms: vec![room], ..Reading::default() }
        }

        fn draw(&self, guard: &mut Sampled, now: Instant) -> u64 {
            match guard.decision.draw() {
                Ok(0) => {
                    guard.judge(&self.reading(), self.held, now);
                    guard.decision.draw().map_or(0, |drawn| drawn.max(1))
                }
                drawn => drawn.unwrap_or(0),
            }
        }

        /// Offers `count` connections; returns how many were admitted.
        fn offer(&mut self, guard: &mut Sampled, count: u64, now: Instant) -> u64 {
            let before = self.held;
            for _ in 0..count {
                if self.drawn == 0 {
                    self.drawn = self.draw(guard, now);
                }
                if self.drawn > 0 {
                    self.drawn -= 1;
                    self.held += 1;
                    self.held_max = self.held_max.max(self.held);
                }
            }
            self.held - before
        }
    }

    /// A guard with its latest decision.
    struct Sampled {
        guard: MemoryGuard,
        decision: Decision,
    }

    impl Sampled {
        fn judge(&mut self, reading: &Reading, connections: u64, now: Instant) -> Option<Change> {
            self.decision = self.guard.decide(reading, connections, now);
            self.decision.change
        }

        fn shortage(&self) -> Option<&Shortage> {
            self.decision.shortage.as_ref()
        }
    }

    fn sampled(guard: MemoryGuard) -> Sampled {
        Sampled { decision: guard.unsampled(), guard }
    }

    fn machine(total_bytes: u64, bytes_each: u64) -> Machine {
        let others_bytes = total_bytes / 20;
        Machine {
            total_bytes,
            others_bytes,
            bytes_each,
            held: 0,
            held_max: 0,
            kept_percent: 0,
            data_bytes: None,
            drawn: 0,
        }
    }

    fn guard(reserve: Reserve) -> Sampled {
        let buffer_limits = Some([100, 200, 300]);
        sampled(MemoryGuard { buffer_limits, ..MemoryGuard::new(reserve, 1) })
    }

    #[test]
    fn however_fast_peers_come_the_reserve_is_not_used_and_little_else_is_left_unused() {
        for (total, each) in
            [(12 << 20, 900), (2 * GIB, 3_900), (6 * GIB, 7_800), (6 * GIB, 30_000)]
        {
            let mut machine = machine(total, each);
            let mut guard = guard(Reserve::Default);
            let admitted = machine.offer(&mut guard, 3_000_000, Instant::now());
            let room = machine.reading().rooms[0].bytes;
            let reserve = Reserve::Default.bytes(total);
            assert!(room >= reserve, "{total}, {each}: {room} are left, {reserve} are the reserve");
            let unused = room - reserve;
            assert!(unused < total / 10, "{total}, {each}: {unused} are unused, {admitted} held");
            assert!(guard.guard.samples < admitted / BUDGET_MAX + 100, "{}", guard.guard.samples);
            assert_eq!(
                (guard.guard.closings, guard.shortage().map(Shortage::name)),
                (1, Some("memory"))
            );
        }
    }

    #[test]
    fn where_data_is_charged_too_all_connections_may_have_some_at_once() {
        let mut machine = Machine { data_bytes: Some(0), ..machine(12 << 20, 1_600) };
        let mut guard = guard(Reserve::Default);
        let started = Instant::now();
        machine.offer(&mut guard, 20_000, started);
        assert!(machine.held > 1_500, "{} held", machine.held);
        machine.data_bytes = Some(machine.held * DATA_BYTES_PER_CONNECTION);
        let room = machine.reading().rooms[0].bytes;
        let reserve = Reserve::Default.bytes(12 << 20);
        assert!(room >= reserve, "{room} are left, {reserve} are the reserve");

        // When the data is gone, the limit is the same as before.
        machine.data_bytes = Some(0);
        let later = started + Duration::from_secs(10);
        assert_eq!(guard.judge(&machine.reading(), machine.held, later), None);
        assert!(guard.shortage().is_some());
    }

    #[test]
    fn unused_admissions_of_other_threads_fit_into_the_rest() {
        const THREADS: u64 = 8;
        let mut machine = machine(2 * GIB, 3_900);
        let mut guard = sampled(MemoryGuard {
            buffer_limits: None,
            ..MemoryGuard::new(Reserve::Default, THREADS)
        });
        let now = Instant::now();
        let reserve = Reserve::Default.bytes(2 * GIB);
        while guard.shortage().is_none() {
            machine.offer(&mut guard, 1_000, now);
            let drawn_bytes =
                (THREADS - 1) * guard.decision.admissions_per_draw * machine.bytes_each;
            let room = machine.reading().rooms[0].bytes;
            assert!(room - drawn_bytes >= reserve, "{room} are left, {drawn_bytes} come late");
        }
        assert!(guard.decision.draw().is_err());
    }

    #[test]
    fn many_threads_with_little_memory_take_smaller_shares() {
        const THREADS: u64 = 16;
        let mut machine = Machine { others_bytes: 22 << 20, ..machine(32 << 20, 1_500) };
        let mut guard = sampled(MemoryGuard {
            buffer_limits: None,
            ..MemoryGuard::new(Reserve::Default, THREADS)
        });
        assert_eq!(machine.offer(&mut guard, 60, Instant::now()), 60);
        machine.offer(&mut guard, 20_000, Instant::now());
        let unused = machine.reading().rooms[0].bytes - Reserve::Default.bytes(32 << 20);
        assert!(unused < 1 << 20, "{unused} are unused");
    }

    #[test]
    fn another_process_that_ends_does_not_change_the_reserve() {
        let mut machine = machine(24 << 20, 1_500);
        machine.others_bytes = 8 << 20;
        let mut guard = guard(Reserve::Default);
        let now = Instant::now();
        for step in 0..8 {
            machine.others_bytes = (8 - step) << 20;
            machine.offer(&mut guard, 1_000, now);
        }
        machine.offer(&mut guard, 20_000, now);
        let (room, reserve) = (machine.reading().rooms[0].bytes, Reserve::Default.bytes(24 << 20));
        assert!(guard.shortage().is_some() && room >= reserve, "{room} of {reserve}");
    }

    #[test]
    fn memory_that_can_no_longer_be_read_is_not_assumed_to_be_plentiful() {
        let mut machine = machine(2 * GIB, 3_900);
        let mut guard = guard(Reserve::Default);
        let now = Instant::now();
        machine.offer(&mut guard, 1_000, now);
        assert_eq!(guard.judge(&Reading::default(), 1_000, now), None);
        assert_eq!(guard.decision.admissions.left(), ADMISSIONS_MIN);
    }

    #[test]
    fn it_opens_again_when_memory_is_back_and_not_before() {
        let mut machine = machine(2 * GIB, 3_900);
        let mut guard = guard(Reserve::Default);
        let started = Instant::now();
        machine.offer(&mut guard, 1_000_000, started);
        let full = machine.held;

        machine.held -= full / 50;
        let later = started + Duration::from_secs(10);
        assert_eq!(
            guard.judge(&machine.reading(), machine.held, later),
            None,
            "too few have closed"
        );
        machine.held -= full / 4;
        let soon = started + CLOSED_MIN / 2;
        assert_eq!(guard.judge(&machine.reading(), machine.held, soon), None, "it does not flap");
        assert_eq!(guard.judge(&machine.reading(), machine.held, later), Some(Change::Opened));
        let admitted = machine.offer(&mut guard, 1_000_000, later);
        assert!(machine.held.abs_diff(full) < full / 50, "{admitted} admitted, {full} before");
        assert_eq!(guard.guard.closings, 2);
    }

    #[test]
    fn closed_connections_are_replaced_though_the_kernel_keeps_their_memory() {
        let mut machine = Machine { kept_percent: 100, ..machine(2 * GIB, 3_900) };
        let mut guard = guard(Reserve::Default);
        let started = Instant::now();
        machine.offer(&mut guard, 1_000_000, started);
        let full = machine.held;
        machine.held -= full / 10;
        let later = started + Duration::from_secs(10);
        assert_eq!(guard.judge(&machine.reading(), machine.held, later), Some(Change::Opened));
        assert_eq!(machine.offer(&mut guard, 1_000_000, later), full / 10);

        machine.held -= full / 10;
        machine.others_bytes += 200 << 20;
        let later = later + Duration::from_secs(10);
        assert_eq!(
            guard.judge(&machine.reading(), machine.held, later),
            None,
            "others have taken it"
        );
    }

    #[test]
    fn memory_that_others_take_closes_it_too() {
        let mut machine = machine(2 * GIB, 3_900);
        let mut guard = guard(Reserve::Bytes(100 << 20));
        let now = Instant::now();
        machine.offer(&mut guard, 1_000, now);
        assert_eq!(guard.shortage(), None);
        machine.others_bytes = 2 * GIB - (90 << 20);
        assert_eq!(guard.judge(&machine.reading(), machine.held, now), Some(Change::Closed));
        let line = guard.shortage().expect("is closed").to_string();
        assert!(line.contains("reserve 104.9 MB") && !line.contains('\n'), "{line}");
    }

    #[test]
    fn it_closes_before_the_kernel_drops_data_for_lack_of_buffers() {
        let machine = machine(2 * GIB, 3_900);
        let mut guard = guard(Reserve::Default);
        let started = Instant::now();
        let mut judge = |queued_bytes, seconds| {
            let reading = Reading { queued_bytes, ..machine.reading() };
            guard.judge(&reading, 0, started + Duration::from_secs(seconds))
        };
        assert_eq!(judge(240, 0), None);
        assert_eq!(judge(260, 1), Some(Change::Closed));
        assert_eq!(judge(240, 5), None, "still above the pressure mark");
        assert_eq!(judge(190, 6), Some(Change::Opened));
    }

    #[test]
    fn when_buffers_are_short_slow_readers_free_what_keeps_it_closed() {
        let machine = machine(2 * GIB, 3_900);
        let limits = Some([100 << 20, 200 << 20, 300 << 20]);
        let judge = |buffer_limits, queued_bytes, buffers_pressed| {
            let mut guard =
                sampled(MemoryGuard { buffer_limits, ..MemoryGuard::new(Reserve::Default, 2) });
            let reading = Reading { queued_bytes, buffers_pressed, ..machine.reading() };
            guard.judge(&reading, 0, Instant::now());
            (guard.decision.buffers_full, guard.decision.buffers_to_free_bytes >> 20)
        };
        assert_eq!(judge(limits, 90 << 20, false), (false, 0));
        assert_eq!(judge(limits, 110 << 20, false), (true, 0));
        assert_eq!(judge(limits, 270 << 20, false), (true, 60), "for each of two threads");
        assert_eq!(judge(None, 60 << 20, false), (false, 0));
        assert_eq!(judge(None, 70 << 20, false), (true, 0));
        assert_eq!(judge(None, 80 << 20, true), (true, 10));
    }

    #[test]
    fn where_the_limits_of_buffers_are_hidden_the_kernels_state_counts() {
        let machine = machine(2 * GIB, 3_900);
        let mut guard =
            sampled(MemoryGuard { buffer_limits: None, ..MemoryGuard::new(Reserve::Default, 1) });
        let started = Instant::now();
        let mut judge = |buffers_pressed, seconds| {
            let reading = Reading { buffers_pressed, ..machine.reading() };
            guard.judge(&reading, 0, started + Duration::from_secs(seconds))
        };
        assert_eq!(judge(false, 0), None);
        assert_eq!(judge(true, 1), Some(Change::Closed));
        assert_eq!(judge(false, 6), Some(Change::Opened));
    }

    #[test]
    fn memory_that_fluctuates_does_not_open_it() {
        let mut machine = machine(2 * GIB, 3_900);
        let mut guard = guard(Reserve::Default);
        let started = Instant::now();
        machine.offer(&mut guard, 1_000_000, started);
        let others_bytes = machine.others_bytes;
        let mut change = |others_bytes, seconds| {
            machine.others_bytes = others_bytes;
            guard.judge(&machine.reading(), machine.held, started + Duration::from_secs(seconds))
        };
        for round in 1..=10 {
            assert_eq!(change(0, 10 * round), None);
            assert_eq!(change(0, 10 * round + 2), None);
            assert_eq!(change(others_bytes, 10 * round + 4), None);
        }
        assert_eq!(change(0, 200), None);
        assert_eq!(change(0, 203), Some(Change::Opened));
    }

    #[test]
    fn fewer_are_refused_at_once_the_more_of_the_reserve_is_used() {
        let mut machine = machine(12 << 20, 900);
        let mut guard = guard(Reserve::Default);
        let now = Instant::now();
        machine.offer(&mut guard, 20_000, now);
        let reserve = Reserve::Default.bytes(12 << 20);
        let mut granted = |taken_bytes| {
            machine.others_bytes += taken_bytes;
            guard.judge(&machine.reading(), machine.held, now);
            (1..).find(|_| !guard.decision.refuse()).unwrap_or_default()
        };
        let at_first = granted(0);
        assert!((REFUSALS_MIN + 1..=reserve / 16 / 800).contains(&at_first), "{at_first}");
        assert!(granted(reserve * 9 / 20) < at_first);
        assert_eq!(granted(reserve / 2), REFUSALS_MIN, "new peers still get an answer");
    }

    #[test]
    fn output_queues_are_shed_when_half_of_the_reserve_is_used() {
        let mut machine = machine(24 << 20, 900);
        let mut guard = guard(Reserve::Default);
        let now = Instant::now();
        machine.offer(&mut guard, 30_000, now);
        let reserve = Reserve::Default.bytes(24 << 20);
        let room = machine.reading().rooms[0].bytes;
        let mut overdraft = |left_bytes| {
            machine.others_bytes += machine.reading().rooms[0].bytes - left_bytes;
            guard.judge(&machine.reading(), machine.held, now);
            (guard.decision.memory_to_free_bytes, guard.decision.sample_interval)
        };
        assert_eq!(overdraft(room), (0, SAMPLE_INTERVAL));
        assert_eq!(overdraft(reserve / 2), (0, SAMPLE_INTERVAL_TIGHT));
        assert_eq!(overdraft(reserve / 2 - 1_000), (1_000, SAMPLE_INTERVAL_TIGHT));
    }

    #[test]
    fn output_queues_leave_half_of_the_reserve() {
        let room = |bytes| MemoryRoom { bytes, ..machine(2 * GIB, 1).reading().rooms[0].clone() };
        let reserve = Reserve::Bytes(100 << 20);
        assert_eq!(queues_bytes_within(&room(GIB), reserve), 50 << 20);
        assert_eq!(queues_bytes_within(&room(140 << 20), reserve), 10 << 20);
        assert_eq!(queues_bytes_within(&room(GIB), Reserve::Bytes(0)), GIB / 4);
    }

    #[test]
    fn a_reserve_of_all_the_memory_is_refused() {
        for reserve in [Reserve::Bytes(1 << 50), Reserve::Bytes(u64::MAX)] {
            let line =
                MemoryGuard::new(reserve, 1).check_reserve().expect_err("more than there is");
            assert!(line.contains("all the memory there is") && !line.contains('\n'), "{line}");
        }
        assert_eq!(MemoryGuard::new(Reserve::Percent(99.0), 1).check_reserve(), Ok(()));
    }

    #[test]
    fn a_reserve_of_nearly_all_opens_when_the_machine_is_idle() {
        let mut machine = machine(2 * GIB, 3_900);
        let mut guard = guard(Reserve::Percent(90.0));
        let started = Instant::now();
        machine.others_bytes = GIB;
        assert_eq!(guard.judge(&machine.reading(), 0, started), Some(Change::Closed));
        let lacking = guard.decision.lacking_bytes().expect("it is closed for memory");
        machine.others_bytes -= lacking;
        for (seconds, change) in [(5, None), (9, Some(Change::Opened))] {
            let now = started + Duration::from_secs(seconds);
            assert_eq!(guard.judge(&machine.reading(), 0, now), change);
        }
    }

    #[test]
    fn where_nothing_can_be_read_every_peer_is_admitted() {
        let mut guard = guard(Reserve::Default);
        assert_eq!(guard.judge(&Reading::default(), 0, Instant::now()), None);
        assert!(guard.decision.draw().is_ok() && guard.guard.record(Instant::now()).is_none());
    }

    #[test]
    fn a_reserve_is_a_size_or_a_share() {
        assert_eq!(Reserve::parse("512M"), Ok(Reserve::Bytes(512 << 20)));
        assert_eq!(Reserve::parse("5%").map(|reserve| reserve.bytes(1000)), Ok(50));
        assert_eq!(Reserve::Default.bytes(6 * GIB), 6 * GIB / 10);
        assert_eq!(Reserve::Default.bytes(24 * GIB), GIB);
        for text in ["100%", "-1%", "%", "x%", "NaN%", "", "much"] {
            assert!(Reserve::parse(text).is_err(), "{text}");
        }
    }
}
