//! Processor time of this process and of the whole machine.

use c1000k_record::CpuPoint;
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::{SysconfVar, sysconf};

use super::process::seconds;
use crate::text;

/// Processor time until now, from `getrusage` and `/proc/stat`.
#[must_use]
pub fn cpu_point() -> Option<CpuPoint> {
    let time = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let machine = MachineTime::read();
    Some(CpuPoint {
        process_seconds: seconds(time.user_time()) + seconds(time.system_time()),
        machine_busy_seconds: machine.map(|machine| machine.busy_seconds),
        machine_softirq_seconds: machine.map(|machine| machine.softirq_seconds),
    })
}

/// The processors of this machine that are online, as `/proc/stat` lists them.
#[must_use]
pub fn processors() -> Option<u64> {
    processors_of(&text::read("/proc/stat")?)
}

fn processors_of(stat: &str) -> Option<u64> {
    let is_one = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    Some(stat.lines().filter(is_one).count() as u64).filter(|count| *count > 0)
}

/// Time of all processors since the machine started.
#[derive(Clone, Copy, Debug, PartialEq)]
struct MachineTime {
    /// Neither idle nor idle with input or output under way; what a host took from its guest counts as busy.
    busy_seconds: f64,
    softirq_seconds: f64,
}

impl MachineTime {
    fn read() -> Option<Self> {
        let ticks_per_second = sysconf(SysconfVar::CLK_TCK).ok()??;
        Self::parse(&text::read("/proc/stat")?, ticks_per_second as f64)
    }

    /// Understands the first line of `/proc/stat`: user, nice, system, idle, iowait, irq, softirq, steal; the guests that
    /// follow are in user already.
    fn parse(stat: &str, ticks_per_second: f64) -> Option<Self> {
        let ticks = text::numbers(stat.lines().next()?.strip_prefix("cpu ")?)?;
        let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else { return None };
        let steal = ticks.get(7).copied().unwrap_or(0);
        let busy: f64 =
            [user, nice, system, irq, softirq, steal].iter().map(|&ticks| ticks as f64).sum();
        Some(Self {
            busy_seconds: busy / ticks_per_second,
            softirq_seconds: softirq as f64 / ticks_per_second,
        })
    }
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
    }

    #[test]
    fn this_machine_can_be_read() {
        let before = cpu_point().expect("getrusage works");
        let after = cpu_point().expect("getrusage works");
        assert!(after.process_seconds >= before.process_seconds, "{before:?} {after:?}");
        assert!(after.machine_busy_seconds >= before.machine_busy_seconds, "{before:?} {after:?}");
        assert!(after.machine_busy_seconds.is_some() && processors() > Some(0));
    }

    proptest! {
        #[test]
        fn a_damaged_stat_breaks_nothing(stat in damaged(STAT)) {
            let _ = (MachineTime::parse(&stat, 100.0), processors_of(&stat));
        }
    }
}
