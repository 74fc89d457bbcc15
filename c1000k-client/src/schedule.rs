//! When messages are due during the hold.
//!
//! The due time of a message is fixed before anything is sent, and its latency is measured from that time, so that a
//! server or client that falls behind does not hide latencies by sending fewer messages (coordinated omission).

use std::time::Duration;

/// Messages are due at multiples of this, so that one wake-up sends several.
pub(crate) const STEP: Duration = Duration::from_millis(1);

/// How often messages are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// One from each connection in this time.
    Heartbeat(Duration),
    /// This many per second, from all connections in turn.
    PerSecond(u64),
}

/// The messages of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// How often they are sent.
    pub pace: Pace,
    /// The part of the connections that sends them, from 0 to 1.
    pub active_share: f64,
}

impl Workload {
    /// How many of the connections send messages: one at least.
    pub(crate) fn active(&self, connections: usize) -> usize {
        let active = (connections as f64 * self.active_share).round() as usize;
        active.clamp(connections.min(1), connections)
    }

    pub(crate) fn schedule(&self, active: usize) -> Schedule {
        let period = match self.pace {
            Pace::Heartbeat(period) => period,
            Pace::PerSecond(rate) => Duration::from_secs_f64(active as f64 / rate as f64),
        };
        Schedule { period, active: active as u128 }
    }
}

/// The due times of messages, since the first one: each connection has its turn once in a period, spread evenly.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub(crate) period: Duration,
    active: u128,
}

impl Schedule {
    /// When the message with this number, from 0, is due.
    pub(crate) fn due(&self, number: u64) -> Duration {
        let exact_ns = u128::from(number) * self.period.as_nanos() / self.active.max(1);
        let step_ns = STEP.as_nanos();
        nanoseconds(exact_ns / step_ns * step_ns)
    }

    /// Whether the next turn of a connection, after a message that was due at this time, has passed while it waited for the
    /// answer: it was before the message with this number. A turn that is still to come is sent by the schedule.
    pub(crate) fn has_passed(&self, due: Duration, next: u64) -> bool {
        due + self.period + STEP <= self.due(next)
    }

    /// The connection, from 0, that sends the message with this number.
    pub(crate) fn turn(&self, number: u64) -> usize {
        (u128::from(number) % self.active.max(1)) as usize
    }
}

/// The longest run has 2^64 nanoseconds in 584 years.
fn nanoseconds(count: u128) -> Duration {
    Duration::from_nanos(u64::try_from(count).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(pace: Pace, active: usize) -> Schedule {
        Workload { pace, active_share: 1.0 }.schedule(active)
    }

    #[test]
    fn a_heartbeat_gives_each_connection_one_turn_in_a_period() {
        let minute = Duration::from_secs(60);
        let schedule = schedule(Pace::Heartbeat(minute), 1_000_000);
        assert_eq!(schedule.due(0), Duration::ZERO);
        assert_eq!(schedule.due(500_000), minute / 2);
        assert_eq!(schedule.due(1_000_000), minute);
        assert_eq!((schedule.turn(999_999), schedule.turn(1_000_000)), (999_999, 0));
        assert_eq!(schedule.due(16_680), Duration::from_secs(1), "800 us past a step");
    }

    #[test]
    fn a_turn_has_passed_once_the_schedule_is_beyond_it() {
        let schedule = schedule(Pace::Heartbeat(Duration::from_secs(1)), 1_000);
        let ms = Duration::from_millis;
        // The next turn of the connection whose message was due after 300 ms is number 1,300.
        assert!(!schedule.has_passed(ms(300), 1_250), "it is still to come");
        assert!(!schedule.has_passed(ms(300), 1_300));
        assert!(schedule.has_passed(ms(300), 1_302));
    }

    #[test]
    fn a_rate_is_kept_whatever_the_number_of_connections() {
        for active in [1, 7, 10_000] {
            let schedule = schedule(Pace::PerSecond(2_000), active);
            assert_eq!(schedule.due(20_000), Duration::from_secs(10), "{active}");
        }
    }

    #[test]
    fn no_message_is_due_before_the_one_before_it_or_off_a_step() {
        let schedule = schedule(Pace::PerSecond(3_333), 77);
        let due: Vec<Duration> = (0..10_000).map(|number| schedule.due(number)).collect();
        assert!(due.is_sorted() && due.iter().all(|due| due.subsec_nanos() % 1_000_000 == 0));
    }

    #[test]
    fn the_active_part_is_at_least_one_connection() {
        let part = |active_share, connections| {
            Workload { pace: Pace::PerSecond(1), active_share }.active(connections)
        };
        assert_eq!(part(0.01, 10_000), 100);
        assert_eq!(part(0.01, 10), 1);
        assert_eq!(part(1.0, 10), 10);
        assert_eq!(part(0.5, 0), 0);
    }
}
