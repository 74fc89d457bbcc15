//! Processor time of the whole machine.

use crate::text;

/// Time of all processors together since the machine started.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MachineTime {
    /// Neither idle nor waiting for input or output; time that a hypervisor gave to others counts as busy.
    pub busy_seconds: f64,
    /// The part of it in soft interrupts, which handle packets.
    pub softirq_seconds: f64,
}

impl MachineTime {
    /// Reads `/proc/stat`.
    pub fn read() -> Option<Self> {
        Self::parse(&text::read("/proc/stat")?, procfs::ticks_per_second() as f64)
    }

    /// Parses the first line: user, nice, system, idle, iowait, irq, softirq, steal. The time of guests, which follows, is
    /// a part of user and nice.
    fn parse(stat: &str, ticks_per_second: f64) -> Option<Self> {
        let ticks = text::numbers(stat.lines().next()?.strip_prefix("cpu ")?)?;
        let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else { return None };
        // Kernels before 2.6.11 do not have it.
        let steal = ticks.get(7).copied().unwrap_or(0);
        let busy: f64 =
            [user, nice, system, irq, softirq, steal].iter().map(|&ticks| ticks as f64).sum();
        Some(Self {
            busy_seconds: busy / ticks_per_second,
            softirq_seconds: softirq as f64 / ticks_per_second,
        })
    }
}

/// The processors of this machine that are online.
pub fn processors() -> Option<u64> {
    processors_of(&text::read("/proc/stat")?)
}

fn processors_of(stat: &str) -> Option<u64> {
    let is_one = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    Some(stat.lines().filter(is_one).count() as u64).filter(|count| *count > 0)
}

#[cfg(test)]
mod tests {
    use {super::*, crate::text::tests::damaged, proptest::prelude::*};

    const STAT: &str = "cpu  100 10 200 5000 40 3 50 7 0 0\n\
        cpu0 50 5 100 2500 20 2 25 3 0 0\ncpu1 50 5 100 2500 20 1 25 4 0 0\n\
        intr 12 0\nctxt 7\nbtime 1\n";

    #[test]
    fn busy_is_what_is_not_idle() {
        let time = MachineTime::parse(STAT, 100.0);
        assert_eq!(time, Some(MachineTime { busy_seconds: 3.7, softirq_seconds: 0.5 }));
        assert_eq!(processors_of(STAT), Some(2));
        assert_eq!((MachineTime::parse("", 100.0), processors_of("")), (None, None));
    }

    #[test]
    fn this_machine_can_be_read() {
        let before = MachineTime::read().expect("every process may read it");
        let after = MachineTime::read().expect("every process may read it");
        assert!(after.busy_seconds >= before.busy_seconds, "{before:?} {after:?}");
        assert!(processors() > Some(0));
    }

    proptest! {
        #[test]
        fn a_damaged_stat_breaks_nothing(stat in damaged(STAT)) {
            let _ = (MachineTime::parse(&stat, 100.0), processors_of(&stat));
        }
    }
}
